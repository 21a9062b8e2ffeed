r"""Webdataset tars of conversations about pictures: how a sample is written in one, and read back.

Two layouts, as the LLaVA systems have them. ``conversations``: ``KEY.jpg`` and ``KEY.json``, the list of
turns ``{"from": "human", "value": "<image>\nWhat is this?"}``; more pictures of a sample are ``KEY.1.jpg``,
``KEY.2.jpg``. ``question_answer``: ``KEY.jpg``, ``KEY.txt`` with the answer and ``KEY.json`` with
``{"question": ...}``. Pictures keep their bytes; the name of the part says what they are.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from msgspec.structs import replace

from plait.config.paths import shard_name
from plait.data import split
from plait.data.chat import Message, Part, Picture, Sample, Text
from plait.data.images import check_tags, media_type
from plait.data.rejects import NAME, Record, Rejects, to_json
from plait.data.tars import Entry, Parts, TarWriter
from plait.errors import DataError, RecordError

if TYPE_CHECKING:
    from plait.data.prints import Seen

IMAGE = "<image>"
SAMPLES = "samples.jsonl"
"""Of each sample, where it came from."""
HUMAN = {"user": "human", "assistant": "gpt", "system": "system"}
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ENDINGS = {
    "image/jpeg": "jpg",
    "image/png": "png",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/bmp": "bmp",
    "image/tiff": "tif",
}
PICTURE_PART = re.compile(r"(?:(\d+)\.)?(jpe?g|png|webp|gif|bmp|tiff?)")
LIKE_A_PICTURE = re.compile(r".*\b(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf]|jxl|jp2|svg|p[bgp]m)")
"""Parts that would be a picture's: by other names, or of kinds that are not read."""
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_-]")


@dataclass
class Written:
    """What stands in a dataset's tars.

    Attributes:
        shards: samples of each tar.
        kinds: kinds of picture files.
        larger: key of the first sample that is not one picture and one exchange.
        rejected: samples that no tar has, by reason.
        others: samples of the other part.
    """

    shards: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    others: int = 0
    kinds: set[str] = field(default_factory=set)
    larger: str = ""

    def note(self, sample: Sample, key: str) -> None:
        """Take a sample into account."""
        self.kinds |= {kind_of(one) for one in sample.pictures}
        roles = [message.role for message in sample.messages]
        if roles != ["user", "assistant"] or len(sample.pictures) != 1:
            self.larger = self.larger or key


# Writing


def nth(number: int) -> Record:
    """A sample by its number, where nothing better is known."""
    return Record(Path("samples"), number + 1, "")


def write(
    samples: Iterable[Sample | None],
    folder: Path,
    settings: Mapping[str, Any],
    where: Callable[[int], Record] = nth,
    duplicates: str = "count",
    note: Callable[[str, int, str, Entry], None] = lambda *_: None,
) -> Written:
    """Write tars of at most ``samples_per_shard`` samples; equal samples give equal bytes.

    One sample is in memory at a time. ``samples.jsonl`` says of each where it came from;
    what no tar can hold is in ``rejects.jsonl``.

    Args:
        samples: conversations with ids; None for each that is of the other part.
        folder: where the tars go.
        settings: ``layout``, ``shard_name``, ``samples_per_shard`` and ``reject_limit`` of
            ``datasets.*.energon``.
        where: says where the sample of a number came from.
        duplicates: ``datasets.*.duplicates`` of the config.
        note: told of each sample: its tar, its number there from 0, its key and where it stands.

    Raises:
        ConfigError: ``shard_name`` does not name tars.
        DataError: more are rejected than ``reject_limit`` allows, or all.
    """
    from plait.data.prints import Seen

    with (folder / NAME).open("wb") as out, (folder / SAMPLES).open("wb") as listed, Seen() as seen:
        rejected, made = Rejects(out), Written()
        once = _once(_own(samples, made), seen, where, rejected, duplicates)
        fitting = _fitting(once, settings["layout"], where, rejected)
        for tar, key, (number, sample), entry in _write_tars(fitting, folder, settings):
            listed.write(_listed(sample, key, tar, where(number)))
            note(tar, made.shards.setdefault(tar, 0), key, entry)
            made.note(sample, key)
            made.shards[tar] += 1
    made.rejected = to_json(rejected.reasons)
    kept = sum(made.shards.values())
    rejected.check(
        kept + rejected.count,
        settings["reject_limit"],
        str(folder),
        "mend the records, or change layout or reject_limit of the dataset's energon keys",
    )
    if not kept:
        raise DataError(
            f"there is not one sample to write: {rejected.count} are rejected, {made.others} are of the "
            "dataset's other part",
            hint=split.EMPTY if made.others else "look at the ledgers of the chat shards",
        )
    return made


Fitting = Iterator[tuple[int, Sample, Parts]]
"""Samples with their numbers among all, and the parts of their tar entries."""


def _own(samples: Iterable[Sample | None], made: Written) -> Iterator[tuple[int, Sample]]:
    """The samples of the part, with their numbers among all."""
    for number, sample in enumerate(samples):
        if sample is None:
            made.others += 1
        else:
            yield number, sample


def _once(
    samples: Iterable[tuple[int, Sample]],
    seen: "Seen",
    where: Callable[[int], Record],
    rejected: Rejects,
    duplicates: str,
) -> Iterator[tuple[int, Sample]]:
    """The samples whose key no earlier one has, nor its content if so wished; the others are written down."""
    from plait.data.said import digest

    for number, sample in samples:
        record = where(number)._replace(id=sample.id)
        first = seen.before(key_for(sample.id).encode(), record)
        if first is not None:
            rejected.add(record, "duplicate_id", f"{first} has the same id")
            continue
        first = seen.before(digest(sample), record) if duplicates == "reject" else None
        if first is not None:
            rejected.add(record, "duplicate", f"{first} says the same")
            continue
        yield number, sample


def _fitting(
    samples: Iterable[tuple[int, Sample]], layout: str, where: Callable[[int], Record], rejected: Rejects
) -> Fitting:
    """The samples that a tar can hold, as training can read them; the others are written down."""
    for number, sample in samples:
        found = with_question(sample)
        try:
            parts = to_parts(found, layout)
            for picture in found.pictures:
                check_tags(picture)
        except RecordError as error:
            rejected.add(where(number)._replace(id=sample.id), error.reason, str(error))
            continue
        yield number, found, parts


def _write_tars(
    fitting: Fitting, folder: Path, settings: Mapping[str, Any]
) -> Iterator[tuple[str, str, tuple[int, Sample], Entry]]:
    """Write samples; of each the name of its tar, its key, itself with its number, and where it stands."""
    size = settings["samples_per_shard"]
    for shard, numbered in groupby(enumerate(fitting), key=lambda pair: pair[0] // size):
        name = shard_name(settings["shard_name"], shard)
        with TarWriter(folder / name) as tar:
            for _, (number, sample, parts) in numbered:
                key = key_for(sample.id)
                yield name, key, (number, sample), tar.add(key, parts)


def _listed(sample: Sample, key: str, tar: str, record: Record) -> bytes:
    """The line of ``samples.jsonl``: tar and key, the chat record, and the line of the raw source."""
    raw = sample.source
    row = {
        "tar": tar,
        "key": key,
        "id": sample.id,
        "chat": _from_here(record.file),
        "line": record.line,
        "raw": raw.path(record.file) if raw else "",
        "raw_line": raw.line if raw else None,
    }
    return orjson.dumps(row) + b"\n"


@lru_cache(maxsize=64)
def _from_here(path: Path) -> str:
    """A path from the working folder; many samples stand in one file."""
    return os.path.relpath(path)


def key_for(id_: str) -> str:
    """The key of a sample's tar entries: its id, where that has no dot, slash or letter of other kinds.

    >>> key_for("004539375"), key_for("train/1.jpg")
    ('004539375', 'train_1_jpg-73f24341c26d3a27')
    """
    if PLAIN_KEY.fullmatch(id_):
        return id_
    return f"{NOT_IN_A_KEY.sub('_', id_)[:60]}-{hashlib.sha256(id_.encode()).hexdigest()[:16]}"


def with_question(sample: Sample) -> Sample:
    """The conversation with a user's turn first: a bare caption is the answer to its picture.

    SOLO's captions are one turn of the assistant, picture first; LLaVA's are answers. A first turn in
    which words stand before a picture stays as it is.
    """
    first, *rest = sample.messages
    shown = tuple(part for part in first.parts if isinstance(part, Picture))
    said = first.parts[len(shown) :]
    if first.role != "assistant" or not shown or not said or first.parts[: len(shown)] != shown:
        return sample
    return replace(sample, messages=(Message("user", shown), Message("assistant", said), *rest))


def to_parts(sample: Sample, layout: str) -> Parts:
    """The parts of a sample's tar entry.

    Raises:
        RecordError: the layout has no place for what the sample has, or its text says ``<image>``.
    """
    for message in sample.messages:
        if any(isinstance(part, Text) and IMAGE in part.text for part in message.parts):
            raise RecordError(
                f"sample {sample.id!r} says {IMAGE} in its text, which stands for a picture",
                reason="picture_in_text",
            )
    pictures = {
        (kind_of(one) if number == 0 else f"{number}.{kind_of(one)}"): one
        for number, one in enumerate(sample.pictures)
    }
    if layout == "conversations":
        turns = [{"from": HUMAN[m.role], "value": _value(m)} for m in sample.messages]
        return {**pictures, "json": orjson.dumps(turns)}
    return {**pictures, **_question_and_answer(sample)}


def _question_and_answer(sample: Sample) -> Parts:
    roles = [message.role for message in sample.messages]
    user, answer = sample.messages[0], sample.messages[-1]
    shown = sum(isinstance(part, Picture) for part in user.parts)
    if roles != ["user", "assistant"] or shown != 1 or len(sample.pictures) != 1:
        raise RecordError(
            f"sample {sample.id!r} has turns {', '.join(roles)} and {len(sample.pictures)} pictures; the "
            "layout question_answer holds one question about one picture, and its answer",
            reason="not_one_exchange",
        )
    asked = {"question": _question(_value(user)), "id": sample.id}
    return {"txt": _value(answer).encode(), "json": orjson.dumps(asked)}


def _question(value: str) -> str:
    r"""A question without ``<image>\n``, where :func:`asked` will put just that back."""
    if value == IMAGE:
        return ""
    short = value.removeprefix(f"{IMAGE}\n")
    return value if IMAGE in short or not short else short


def kind_of(encoded: bytes) -> str:
    """The ending of a picture file, by its first bytes.

    Raises:
        RecordError: it is no picture of a known kind.
    """
    kind = media_type(encoded)
    if kind not in ENDINGS:
        raise RecordError(
            f"a picture of {len(encoded)} bytes is of none of the kinds {', '.join(ENDINGS)}",
            reason="undecodable_picture",
        )
    return ENDINGS[kind]


def _value(message: Message) -> str:
    return "".join(part.text if isinstance(part, Text) else IMAGE for part in message.parts)


# Reading


def decoded(name: str, content: Any, key: str) -> Any:
    """A part's value: json and txt are decoded, all else stays bytes, pictures above all.

    Energon's own decoder also unpickles what is named so; a stranger's tar must not run code.

    Raises:
        RecordError: it is not what its name says.
    """
    kind = name.rpartition(".")[2].lower()
    if not isinstance(content, bytes) or kind not in ("json", "txt"):
        return content
    try:
        return _from_json(content) if kind == "json" else content.decode()
    except (ValueError, RecursionError) as error:
        what = "JSON" if kind == "json" else "text in UTF-8"
        reason = "bad_json" if kind == "json" else "not_text"
        raise RecordError(f"{key}.{name} is not {what}: {error}", reason=reason) from error


def _from_json(content: bytes) -> Any:
    """A value whose texts can be written: json lets halves of surrogate pairs through."""
    found = json.loads(content.decode("utf-8-sig"))
    if b"\\u" in content:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def to_sample(parts: Mapping[str, Any], key: str) -> Sample:
    """A conversation from the parts of a tar entry, decoded or not; their names in letters of either case.

    A list of turns may be without a picture, a question and its answer are about one.

    Raises:
        RecordError: the parts are of neither layout, or a picture is missing or under another name.
    """
    values = {name.lower(): decoded(name, content, key) for name, content in parts.items()}
    named = sorted(filter(PICTURE_PART.fullmatch, values), key=_nth)
    unread = [name for name in values if name not in named and LIKE_A_PICTURE.fullmatch(name)]
    if unread or len(values) < len(parts):
        sentence = f"{key} has the parts {', '.join(parts)}; pictures are named jpg, 1.png and so on"
        raise RecordError(sentence, reason="unknown_part")
    pictures, found = [values[name] for name in named], values.get("json")
    if isinstance(found, list):
        return conversation(found, pictures, key)
    if "txt" not in values or not isinstance(found or {}, dict):
        raise RecordError(f"{key} has neither a list of turns nor an answer", reason="not_a_record")
    if not pictures:
        raise RecordError(f"{key} has a question and an answer, but no picture", reason="missing_picture")
    question = found.get("question", "") if isinstance(found, dict) else ""
    return asked(question, values["txt"], pictures, key)


def _nth(name: str) -> int:
    found = PICTURE_PART.fullmatch(name)
    return int(found[1] or 0) if found else 0


def asked(question: Any, answer: Any, pictures: Sequence[bytes], key: str) -> Sample:
    """One question about pictures, and its answer; where ``<image>`` stands in it, the pictures do.

    Raises:
        RecordError: they are not text, or ``<image>`` does not stand once for each picture.
    """
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RecordError(f"{key}: question and answer are not both text", reason="not_text")
    if IMAGE in question:
        return conversation(
            [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], pictures, key
        )
    text = (Text(f"\n{question}" if pictures else question),) if question else ()
    user = Message("user", (*map(Picture, pictures), *text))
    return Sample((user, Message("assistant", (Text(answer),) if answer else ())), key)


def conversation(turns: Sequence[Any], pictures: Sequence[bytes], key: str) -> Sample:
    """LLaVA's list of turns; where no turn says ``<image>``, the pictures stand before the user's first.

    Raises:
        RecordError: a turn is no turn, or ``<image>`` does not stand once for each picture.
    """
    said = [_turn(turn, key) for turn in turns]
    said = [(role, text) for role, text in said if text or role != "system"]
    if not said:
        raise RecordError(f"{key}: the conversation has no turns", reason="no_messages")
    count = sum(text.count(IMAGE) for _, text in said)
    if not count and pictures:
        first = next((number for number, (role, _) in enumerate(said) if role == "user"), 0)
        said[first] = (said[first][0], IMAGE * len(pictures) + "\n" + said[first][1])
    elif count != len(pictures):
        raise RecordError(
            f"{key} has {len(pictures)} pictures and says {IMAGE} {count} times", reason="wrong_pictures"
        )
    left = iter(pictures)
    return Sample(tuple(Message(role, tuple(_placed(text, left))) for role, text in said), key)


def _turn(turn: Any, key: str) -> tuple[str, str]:
    role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise RecordError(f"{key}: not a list of turns: {str(turn)[:60]}", reason="not_a_record")
    return role, turn["value"]


def _placed(text: str, pictures: Iterator[bytes]) -> Iterator[Part]:
    """The parts of a text in which ``<image>`` stands for pictures."""
    for number, words in enumerate(text.split(IMAGE)):
        if number:
            yield Picture(next(pictures))
        if words:
            yield Text(words)
