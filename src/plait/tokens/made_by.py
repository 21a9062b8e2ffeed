"""What tokens depend on besides records: tokenizer, vocabulary and template, each as a digest.

A shard's manifest has all three, and so has a mixture that energon reads. Training compares them with what
the tokenizer's folder and the template write now. A template's digest is that of what it makes of a few
conversations, so a change of its text and one of its code are both seen.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from plait import files
from plait.data.chat import Message, Sample, Text
from plait.errors import DataError, RecordError
from plait.layout import FAST
from plait.tokens import encode
from plait.tokens.jinja import own_template
from plait.tokens.templates import TEMPLATES, Marks, Template

KEYS = ("tokenizer", "vocabulary", "template")
MARKS = Marks(bos="<bos>", eos="<eos>")
TALKS = (
    ("assistant",),
    ("user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
    ("user",),
)
"""Who speaks in the conversations that a template is known by."""


def made_by(folder: Path, template: str, vocabulary: str = "") -> dict[str, str]:
    """The three digests.

    Args:
        folder: the tokenizer.
        template: ``formats.*.template`` of the config.
        vocabulary: its digest, where it is known.

    Raises:
        DataError: the template is the tokenizer's own, and it has none.
    """
    written = TEMPLATES[template] if template in TEMPLATES else own_template(folder)
    return {
        "tokenizer": files.digest(folder / FAST),
        "vocabulary": vocabulary or digest(encode.ids_by_name(encode.read(folder))),
        "template": digest([_written(written, roles) for roles in TALKS]),
    }


def check(what: str, had: Mapping[str, Any], now: Mapping[str, str], source: str) -> None:
    """Refuse tokens that were made by other things than stand there now.

    Args:
        what: whose tokens they are.
        had: the digests that it was made by; what another program packed may lack some.
        now: those of today.
        source: whose these are.

    Raises:
        DataError: one differs; it is named.
    """
    for key in KEYS:
        if key in had and had[key] != now[key]:
            raise DataError(
                f"{what} was made by another {key}, {had[key][:12]}, than {source} has now, {now[key][:12]}",
                hint=f"ask for {what} again, or bring back the {key} that it was made by",
            )


def _written(template: Template, roles: tuple[str, ...]) -> Any:
    talk = tuple(Message(role, (Text(f" {role} {number}. "),)) for number, role in enumerate(roles))
    try:
        return [[str(piece.content), int(piece.role)] for piece in template.pieces(Sample(talk), MARKS)]
    except RecordError as error:
        return error.reason


def digest(value: Any) -> str:
    """The digest of a value's canonical JSON, as :func:`plait.files.canonical` has it."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()
