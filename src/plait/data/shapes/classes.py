"""Pictures and what they show: captions of webdataset tars, names of ImageNet's classes.

CapsFusion and other sets that img2dataset has fetched: tars of ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` with
``url``; parquet files beside them have the same and further captions. ImageNet-21k: tars of
``n01440764_10026.jpg``. ImageNet: ``n01440764/n01440764_10026.JPEG``. Names of classes: lines of
``n01440764 tench``, or of ``{"id", "name"}``.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from plait.config.paths import local
from plait.data import webdataset
from plait.data.chat import Sample
from plait.data.lines import read_lines
from plait.data.shapes.common import Encoded, Shape, field, said, text
from plait.errors import DataError, RecordError

SPACES = str.maketrans("_-", "  ")


def captions(record: Any, _pictures: Encoded) -> Sample:
    """A picture and then its caption in one turn of the assistant, as SOLO has them."""
    picture = only_picture(record)
    if "caption" in record:
        if record["caption"] is None:
            raise RecordError("the parquet files have no caption for it", reason="missing_caption")
        return Sample((said("assistant", picture, record["caption"]),))
    if "txt" not in record["parts"]:
        raise RecordError(f"{record['key']} has no part txt", reason="missing_caption")
    caption = webdataset.decoded("txt", record["parts"]["txt"], record["key"])
    return Sample((said("assistant", picture, caption),))


def only_picture(record: Any) -> bytes:
    """The picture of a tar's sample.

    Raises:
        RecordError: there is none, or several.
    """
    parts: Mapping[str, bytes] = field(record, "parts")
    named = [name for name in parts if webdataset.PICTURE_PART.fullmatch(name.lower())]
    if len(named) != 1:
        sentence = f"{record['key']} has {len(named)} pictures among its parts {', '.join(parts)}"
        raise RecordError(sentence, reason="missing_picture" if not named else "wrong_pictures")
    return parts[named[0]]


def imagenet(name: str, classes: str) -> Shape:
    """Pictures of ImageNet: SOLO's two ways to say of what class one is."""
    known: dict[str, str] = {}

    def words(class_: str) -> str:
        if not known:
            known.update(names_of(local(classes)))
        if class_ not in known:
            raise RecordError(f"{classes} has no class {class_!r}", reason="unknown_class")
        return known[class_]

    def as_caption(record: Any, pictures: Encoded) -> Sample:
        picture, class_ = _shown(record, pictures)
        return Sample((said("assistant", picture, words(class_).translate(SPACES)),))

    def as_answer(record: Any, pictures: Encoded) -> Sample:
        picture, class_ = _shown(record, pictures)
        return Sample((said("user", picture), said("assistant", words(class_).lower())))

    read = {"imagenet": as_answer, "imagenet-21k": as_caption}[name]
    return Shape(read, lambda record: [record["file"]] if "file" in record else [], holds="classes")


def _shown(record: Any, pictures: Encoded) -> tuple[bytes, str]:
    """A picture and its class: that of its folder, or of its key up to the first underscore."""
    if "file" in record:
        picture = pictures[0]
        assert picture is not None  # the reader has rejected records that lack pictures
        return picture, PurePosixPath(record["file"]).parent.name
    return only_picture(record), PurePosixPath(text(record, "key")).name.partition("_")[0]


def names_of(path: Path) -> dict[str, str]:
    """The names of classes by their ids.

    Raises:
        DataError: a line has none.
    """
    found: dict[str, str] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            class_, name = _class(line)
        except ValueError:  # neither UTF-8 nor JSON
            class_ = name = ""
        if not class_ or not name:
            hint = "lines are `n01440764 tench`, or {id, name} in JSON, in UTF-8"
            raise DataError(f"{path} line {number} names no class: {line[:60]!r}", hint=hint)
        found[class_] = name
    return found


def _class(line: bytes) -> tuple[str, str]:
    if not line.lstrip().startswith(b"{"):
        class_, _, name = line.decode().strip().replace("\t", " ").partition(" ")
        return class_, name.strip()
    row = orjson.loads(line)
    return str(row.get("id", "")), str(row.get("name", ""))
