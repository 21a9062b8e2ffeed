"""LLaVA's json: a list of records ``{"id", "image", "conversations"}``, beside a folder of pictures.

The list may be larger than memory: it is read one record at a time. The records are kept as they are, each
with an id that no other has and with the digests of its pictures, which are not copied.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from plait.data import chat, webdataset, zipped
from plait.data.members import members
from plait.errors import DataError, RecordError

PICTURES = "pictures"
"""The link to the folder of the pictures, or to a zip of them."""
HINT = "a LLaVA json is [{id, image, conversations}, ...]"


# Making


class Unique:
    """Gives every id once: a second ``x`` becomes ``x-2``.

    LLaVA's lists name several talks by the one picture that they are about.
    """

    def __init__(self) -> None:
        """Nothing is given yet."""
        self.given: dict[str, int] = {}
        self.renamed = 0

    def __call__(self, wanted: str) -> str:
        """The id, or the next one that is free; an empty one stays empty."""
        if not wanted or wanted not in self.given:
            self.given[wanted] = 1
            return wanted
        self.renamed += 1
        found = wanted
        while found in self.given:
            self.given[wanted] += 1
            found = f"{wanted}-{self.given[wanted]}"
        self.given[found] = 1
        return found


def records(path: Path) -> Iterator[Any]:
    """The records of a LLaVA json, one at a time.

    Raises:
        DataError: it is no list, is not JSON, or is cut short.
    """
    return members(path, HINT)


def rows(path: Path, pictures: Path, unique: Unique) -> Iterator[bytes]:
    """Each record as a line of the raw source: the record, its id, and digests of its pictures.

    Args:
        path: the json.
        pictures: the folder of its pictures, or a zip of them.
        unique: gives the ids.
    """
    packed = None if pictures.is_dir() else zipped.Zip(pictures)
    for record in records(path):
        wanted = record.get("id", "") if isinstance(record, dict) else ""
        key = unique(str(wanted) if isinstance(wanted, str | int) else "")
        places = [packed.place(name) for name in _names(record)] if packed else []
        digests = [_digest(pictures, name, where) for name, where in _placed(record, places)]
        more = {"places": places} if packed else {}
        line = json.dumps({"id": key, "sha256": digests, **more, "record": record}, separators=(",", ":"))
        yield line.encode() + b"\n"


def _names(record: Any) -> list[Any]:
    """The names of a record's pictures: ``image`` is one, several, or null."""
    found = record.get("image", record.get("images")) if isinstance(record, dict) else None
    return found if isinstance(found, list) else [] if found is None else [found]


def _placed(record: Any, places: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The names of a record's pictures, each with its place in a zip."""
    return zip_longest(_names(record), places)


def _digest(pictures: Path, name: Any, where: Any) -> str | None:
    """The sha256 of a picture; None where there is none: the record will be rejected."""
    try:
        return hashlib.sha256(_encoded(pictures, name, where)).hexdigest()
    except RecordError:
        return None


def _encoded(pictures: Path, name: Any, where: Any) -> bytes:
    """A picture file; ``where`` is its place, if they lie in a zip.

    Raises:
        RecordError: it is missing, or outside the folder: a stranger's list must not read other files.
    """
    if not isinstance(name, str) or not name:
        raise RecordError(f"image is {name!r}, not the name of a file", reason="missing_picture")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise RecordError(f"picture {name} is outside the folder of pictures", reason="missing_picture")
    if where is not None:
        return zipped.read(pictures, where)
    try:
        return (pictures / name).read_bytes()
    except (OSError, ValueError) as error:
        raise RecordError(f"picture cannot be read: {error}", reason="missing_picture") from error


# Reading


def read(line: bytes, folder: Path) -> chat.Sample:
    """The conversation of a line that :func:`rows` wrote.

    Raises:
        RecordError: the record is none of LLaVA's, or a picture is missing.
        DataError: a picture was changed since the raw source was made.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error}", reason="bad_json") from error
    record = row["record"]
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        raise RecordError("the record has no list of conversations", reason="not_a_record")
    pairs = zip(_placed(record, row.get("places", [])), row["sha256"], strict=True)
    pictures = [_unchanged(folder, name, where, wanted) for (name, where), wanted in pairs]
    return checked(webdataset.conversation(turns, pictures, row["id"]))


def _unchanged(folder: Path, name: Any, where: Any, wanted: str | None) -> bytes:
    encoded = _encoded(folder / PICTURES, name, where)
    if wanted is None:
        sentence = f"picture {name} was missing when {folder} was made"
        raise RecordError(sentence, reason="missing_picture", hint=f"remove {folder} and ask for it again")
    if hashlib.sha256(encoded).hexdigest() != wanted:
        raise DataError(
            f"{folder / PICTURES / name} is not the file that became a raw source",
            hint=f"remove {folder} and ask for it again",
        )
    return encoded


def checked(sample: chat.Sample) -> chat.Sample:
    """The sample, if every turn says something.

    Raises:
        RecordError: one does not.
    """
    for number, message in enumerate(sample.messages):
        if not message.says_something:
            raise RecordError(f"turn {number} ({message.role}) is empty", reason="empty_text")
    return sample
