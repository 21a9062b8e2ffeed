r"""Webdataset tars of conversations about pictures: how a sample is written in one, and read back.

Two layouts, as the LLaVA systems have them. ``conversations``: ``KEY.jpg`` and ``KEY.json``, the list of
turns ``{"from": "human", "value": "<image>\nWhat is this?"}``; more pictures of a sample are ``KEY.1.jpg``,
``KEY.2.jpg``. ``question_answer``: ``KEY.jpg``, ``KEY.txt`` with the answer and ``KEY.json`` with
``{"question": ...}``. Pictures keep their bytes, under ``png`` or ``webp`` where they are such.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from plait.data.chat import Message, Part, Picture, Sample, Text
from plait.errors import DataError, RecordError

IMAGE = "<image>"
HUMAN = {"user": "human", "assistant": "gpt", "system": "system"}
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
PICTURE_PART = re.compile(r"(?:(\d+)\.)?(jpg|jpeg|png|webp)")
SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_-]")
TAR_BLOCK = 512

Parts = dict[str, bytes]


@dataclass
class Written:
    """What stands in a dataset's tars.

    Attributes:
        shards: samples of each tar.
        kinds: kinds of picture files.
        simple: whether every sample is one picture and one exchange.
    """

    shards: dict[str, int] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    simple: bool = True


# Writing


def write(samples: Iterable[Sample], folder: Path, settings: Mapping[str, Any]) -> Written:
    """Write tars of at most ``samples_per_shard`` samples; equal samples give equal bytes.

    Args:
        samples: conversations with ids.
        folder: where the tars go.
        settings: ``layout``, ``shard_name`` and ``samples_per_shard`` of ``datasets.*.energon``.

    Raises:
        DataError: two samples have one key, or one does not fit the layout.
    """
    made, seen = Written(), set[str]()
    tar: tarfile.TarFile | None = None
    try:
        for number, sample in enumerate(samples):
            shard, place = divmod(number, settings["samples_per_shard"])
            if place == 0:
                if tar is not None:
                    tar.close()
                name = settings["shard_name"].format(shard)
                tar = _open(folder / name)
                made.shards[name] = 0
            assert tar is not None
            key = NOT_IN_A_KEY.sub("_", sample.id)
            if key in seen:
                raise DataError(f"two samples have the key {key!r}", hint="give records ids of their own")
            seen.add(key)
            _add(tar, key, to_parts(with_question(sample), settings["layout"]), made)
            made.shards[name] += 1
    finally:
        if tar is not None:
            tar.close()
    if not seen:
        raise DataError("there is not one sample to write", hint="look at the ledgers of the chat shards")
    return made


def with_question(sample: Sample) -> Sample:
    """The conversation with a user's turn first: a bare caption is the answer to its picture."""
    first, *rest = sample.messages
    if first.role != "assistant" or not sample.pictures:
        return sample
    asked = Message("user", tuple(part for part in first.parts if isinstance(part, Picture)))
    answer = Message("assistant", tuple(part for part in first.parts if isinstance(part, Text)))
    return Sample((asked, answer, *rest), sample.id)


def to_parts(sample: Sample, layout: str) -> Parts:
    """The parts of a sample's tar entry.

    Raises:
        DataError: the layout has no place for what the sample has.
    """
    pictures = {
        (kind_of(one) if number == 0 else f"{number}.{kind_of(one)}"): one
        for number, one in enumerate(sample.pictures)
    }
    if layout == "conversations":
        turns = [{"from": HUMAN[m.role], "value": _value(m)} for m in sample.messages]
        return {**pictures, "json": orjson.dumps(turns)}
    roles = [message.role for message in sample.messages]
    if roles != ["user", "assistant"] or len(pictures) != 1:
        raise DataError(
            f"sample {sample.id!r} has turns {', '.join(roles)} and {len(pictures)} pictures; the layout "
            "question_answer holds one question, one answer and one picture",
            hint="set energon.layout of the dataset to conversations",
        )
    question, answer = (_words(message) for message in sample.messages)
    asked = {"question": question.removeprefix("\n"), "id": sample.id}
    return {**pictures, "txt": answer.encode(), "json": orjson.dumps(asked)}


def kind_of(encoded: bytes) -> str:
    """The ending of a picture file, by its first bytes; jpg where they are unknown."""
    return next((kind for head, kind in SIGNATURES if encoded.startswith(head)), "jpg")


def _value(message: Message) -> str:
    return "".join(part.text if isinstance(part, Text) else IMAGE for part in message.parts)


def _words(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def _open(path: Path) -> tarfile.TarFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


def _add(tar: tarfile.TarFile, key: str, parts: Parts, made: Written) -> None:
    pictures = [name for name in parts if PICTURE_PART.fullmatch(name)]
    made.kinds |= {name.rpartition(".")[2] for name in pictures}
    turns = orjson.loads(parts["json"])
    made.simple &= len(pictures) == 1 and (isinstance(turns, dict) or len(turns) == 2)
    for name, content in parts.items():
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


# Reading


def read_tar(path: Path) -> Iterator[tuple[str, Parts]]:
    """The samples of a tar in file order: key, and content by part.

    Raises:
        DataError: the tar is damaged or cut short.
    """
    for key, found in places(path):
        yield key, parts_at(path, found)


def places(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples of a tar in file order: key, and where each part's bytes lie: offset and length.

    Raises:
        DataError: the tar is damaged or cut short.
    """
    end = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in groupby(_members(tar), key=lambda member: member[0]):
                found: dict[str, tuple[int, int]] = {}
                for _, name, info in members:
                    if name in found:
                        raise DataError(
                            f"{path}: the key {key!r} has the part {name} twice",
                            hint="readers merge neighbours of one key: give samples keys of their own",
                        )
                    found[name] = (info.offset_data, info.size)
                end = max(offset + -(-size // TAR_BLOCK) * TAR_BLOCK for offset, size in found.values())
                yield key, found
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is damaged or no tar: {error}", hint="write or download the shard again"
        ) from error
    _check_end(path, end)


def parts_at(path: Path, found: Mapping[str, Sequence[int]]) -> Parts:
    """The parts of one sample, by :func:`places`."""
    with path.open("rb") as file:
        return {name: os.pread(file.fileno(), size, offset) for name, (offset, size) in found.items()}


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, part and entry of every file."""
    for info in tar:
        if info.isfile():
            folder, _, name = info.name.rpartition("/")
            stem, _, part = name.partition(".")
            yield (f"{folder}/{stem}" if folder else stem), part, info


def _check_end(path: Path, end: int) -> None:
    """A whole tar ends with two blocks of zeros: without them an unknown number of samples is lost."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(2 * TAR_BLOCK) != bytes(2 * TAR_BLOCK):
            raise DataError(f"{path} is cut short: it has no end", hint="write or download the shard again")


def to_sample(parts: Mapping[str, Any], key: str) -> Sample:
    """A conversation from the parts of a tar entry; json may be decoded already.

    Raises:
        RecordError: the parts are of neither layout.
    """
    pictures = [
        bytes(parts[name]) for name in sorted((n for n in parts if PICTURE_PART.fullmatch(n)), key=_nth)
    ]
    found = parts.get("json")
    try:
        value = orjson.loads(found) if isinstance(found, bytes) else found
    except orjson.JSONDecodeError as error:
        raise RecordError(f"{key}.json is not JSON: {error}", reason="bad_json") from error
    if isinstance(value, list):
        return conversation(value, pictures, key)
    if "txt" not in parts:
        raise RecordError(f"{key} has neither a list of turns nor an answer", reason="not_a_record")
    answer = parts["txt"]
    question = value.get("question", "") if isinstance(value, dict) else ""
    return asked(question, answer.decode() if isinstance(answer, bytes) else answer, pictures, key)


def _nth(name: str) -> int:
    found = PICTURE_PART.fullmatch(name)
    return int(found[1] or 0) if found else 0


def asked(question: str, answer: str, pictures: list[bytes], key: str) -> Sample:
    """One question about pictures, and its answer; where ``<image>`` stands in it, the pictures do."""
    if IMAGE in question:
        user = Message("user", tuple(_placed(question, iter(pictures), key)))
    else:
        text = (Text(f"\n{question}"),) if question else ()
        user = Message("user", (*map(Picture, pictures), *text))
    return Sample((user, Message("assistant", (Text(answer),))), key)


def conversation(turns: list[Any], pictures: list[bytes], key: str) -> Sample:
    """LLaVA's list of turns; where no turn says ``<image>``, the pictures stand before the first.

    Raises:
        RecordError: a turn is no turn, or ``<image>`` does not stand once for each picture.
    """
    try:
        said = [(ROLES[turn["from"]], str(turn["value"])) for turn in turns]
    except (KeyError, TypeError) as error:
        raise RecordError(f"{key}: not a list of turns: {error!r}", reason="not_a_record") from error
    places = sum(text.count(IMAGE) for _, text in said)
    if not places and pictures and said:
        said[0] = (said[0][0], IMAGE * len(pictures) + "\n" + said[0][1])
    elif places != len(pictures):
        raise RecordError(
            f"{key} has {len(pictures)} pictures and says {IMAGE} {places} times", reason="wrong_pictures"
        )
    left = iter(pictures)
    return Sample(tuple(Message(role, tuple(_placed(text, left, key))) for role, text in said), key)


def _placed(text: str, pictures: Iterator[bytes], key: str) -> Iterator[Part]:
    """The parts of a text in which ``<image>`` stands for pictures."""
    for number, words in enumerate(text.split(IMAGE)):
        if number:
            picture = next(pictures, None)
            if picture is None:
                raise RecordError(
                    f"{key} says {IMAGE} more often than it has pictures", reason="wrong_pictures"
                )
            yield Picture(picture)
        if words:
            yield Text(words)
