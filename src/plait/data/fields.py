"""A conversation from the fields of a VQASample: image, context, answers, as a field map names them."""

import re
from collections.abc import Mapping
from typing import Any

from plait.data.chat import Sample
from plait.data.tars import Parts
from plait.data.webdataset import ROLES, asked, conversation, decoded, to_sample
from plait.errors import RecordError

FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
"""A part of a tar entry, and where in its JSON: ``json[0][value]``."""
WHOLE_TALK = "json"
"""A context that is the whole list of turns."""


def of_parts(parts: Parts, key: str, description: Mapping[str, Any]) -> Sample:
    """A conversation from a tar entry, by the dataset's field map; whole where it has none.

    Raises:
        RecordError: a field is not there.
    """
    fields = description.get("field_map")
    if not fields:
        return to_sample(parts, key)
    values = {name: decoded(name, content, key) for name, content in parts.items()}
    return of_fields({field: _access(values, path) for field, path in fields.items()}, key)


def of_fields(values: Mapping[str, Any], key: str) -> Sample:
    """A conversation from the fields of a VQASample: image, context, answers.

    ``context`` may be a whole list of turns: a field map of ``context: json`` keeps all of them. Of several
    answers the first is taken.

    Raises:
        RecordError: a field is of another kind.
    """
    pictures = [values["image"]] if values.get("image") is not None else []
    if not all(isinstance(picture, bytes) for picture in pictures):
        raise RecordError(f"{key}: image is no part of the tar", reason="not_a_picture")
    context, answers = values.get("context", ""), values.get("answers")
    if isinstance(context, list):
        return conversation(context, pictures, key)
    return asked(context, answers[0] if isinstance(answers, list) and answers else answers, pictures, key)


def _access(parts: Mapping[str, Any], path: str) -> Any:
    """The value of ``json[0][value]`` or ``jpg,png``: the first of the alternatives that is there."""
    for alternative in path.split(","):
        found = FIELD.fullmatch(alternative)
        steps = [found[1], *re.findall(r"[^\[\]]+", found[2])] if found else [alternative]
        value: Any = parts
        try:
            for step in steps:
                value = value[int(step) if isinstance(value, list) else step]
        except (LookupError, TypeError, ValueError):
            continue
        return value
    raise RecordError(f"there is no part {path}", reason="missing_field")


def check_whole(sample: Sample, parts: Parts, fields: Mapping[str, str] | None) -> None:
    """A field map must not read the first exchange of a talk that goes on.

    Raises:
        RecordError: it does.
    """
    part = fields["context"].partition("[")[0] if fields else ""
    turns = decoded(part, parts.get(part), sample.id)
    if not isinstance(turns, list):
        return
    speakers = [ROLES.get(str(turn.get("from"))) for turn in turns if isinstance(turn, dict)]
    had = sum(role in ("user", "assistant") for role in speakers)
    read = sum(message.role != "system" for message in sample.messages)
    if had > read:
        raise RecordError(
            f"it has {had} turns, of which the field_map reads {read}; field_map {{context: json}} in the "
            "dataset's energon keys reads all",
            reason="turns_cut_off",
        )
