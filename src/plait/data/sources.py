"""Raw sources: for each kind in config/, how it is made and how its lines are read.

A raw source is a folder of jsonl files, plain or compressed, with whatever their lines point to.
To add a kind: a class in ``config/model.py`` and a row in :data:`KINDS`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from plait import files
from plait.config.paths import JSONL
from plait.data import builtin, chat
from plait.data.lines import read_lines
from plait.errors import DataError, RecordError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """One kind of raw source."""

    make: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    """Fills the folder from the source's settings and gives the facts worth recording."""
    read: Callable[[bytes, Path], chat.Sample]
    """Reads one line; the folder is where the line's pictures are. Raises RecordError."""


@dataclass(frozen=True)
class RawLine:
    """One line of a raw source, not yet read."""

    file: str
    """Its file, relative to the source's folder."""
    number: int
    """Its line in that file, from 1."""
    position: int
    """Its line in the whole source, from 1."""
    content: bytes


# Making


def make(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fill the folder of a raw source.

    Args:
        source: ``datasets.*.source`` of the config.
        folder: an empty folder.

    Returns:
        Facts for the manifest, such as counts.
    """
    return KINDS[source["kind"]].make(source, folder)


def link(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Link the jsonl files that the user has somewhere; their digests go into the manifest.

    Raises:
        DataError: there is no such path, or no jsonl file in it.
    """
    origin = Path(source["path"]).expanduser()
    if not origin.exists():
        hint = "datasets.*.source.path in config/ is taken from the folder where you run plait"
        raise DataError(f"{source['path']} does not exist", hint=hint)
    base = origin if origin.is_dir() else origin.parent
    found = sorted(origin.rglob("*")) if origin.is_dir() else [origin]
    wanted = [path for path in found if JSONL.fullmatch(path.name) and path.is_file()]
    if not wanted:
        hint = "expected .jsonl, .jsonl.gz, .jsonl.lz4 or .jsonl.zst"
        raise DataError(f"{source['path']} holds no chat jsonl", hint=hint)
    for path in wanted:
        place = folder / path.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path.resolve())
    others = sum(path.is_file() for path in found) - len(wanted)
    if others:
        log.info("%s: %d files that are not jsonl are left alone", source["path"], others)
    return {"linked": len(wanted), "other_files": others}


# Reading


def read(folder: Path | str) -> Iterator[RawLine]:
    """Every line of a raw source, file after file; blank lines too.

    Raises:
        DataError: the source is not whole, or a file is damaged or was changed since it was made.
    """
    folder = Path(folder)
    manifest = files.read_manifest(folder, kind="raw")
    position = 0
    for name, entry in manifest["files"].items():
        if not JSONL.fullmatch(Path(name).name):
            continue
        _check_unchanged(folder / name, entry)
        for number, content in read_lines(folder / name):
            position += 1
            yield RawLine(file=name, number=number, position=position, content=content)


def _check_unchanged(path: Path, entry: dict[str, Any]) -> None:
    """A linked file may have been edited since its digest was recorded."""
    if not path.is_file():
        where = path.readlink() if path.is_symlink() else path
        raise DataError(
            f"{path} is gone", hint=f"put {where} back, or remove {path.parent} and make it again"
        )
    if path.stat().st_size != entry["bytes"] or files.digest(path) != entry["sha256"]:
        sentence = f"{path} is not the file of {entry['bytes']} bytes that became a raw source"
        raise DataError(sentence, hint=f"remove {path.parent} and ask for it again")


def read_chat(line: bytes, folder: Path) -> chat.Sample:  # noqa: ARG001
    """A line that is a chat record already."""
    return chat.parse(line)


def read_captioned(line: bytes, folder: Path) -> chat.Sample:
    """A row ``{"id", "picture", "caption"}`` as SOLO has captions: a bare assistant turn, picture first.

    Raises:
        RecordError: the row lacks a key or its picture file is missing.
    """
    try:
        row = orjson.loads(line)
        encoded = (folder / row["picture"]).read_bytes()
        parts = (chat.Picture(encoded), chat.Text(row["caption"]))
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error}", reason="bad_json") from error
    except (KeyError, TypeError) as error:
        raise RecordError(f"not a row with picture and caption: {error}", reason="not_a_record") from error
    except OSError as error:
        raise RecordError(f"picture cannot be read: {error}", reason="missing_picture") from error
    return chat.Sample(id=row.get("id", ""), messages=(chat.Message("assistant", parts),))


KINDS: dict[str, Kind] = {
    "emoji-captions": Kind(make=builtin.emoji_captions, read=read_captioned),
    "chatterbot-dialogues": Kind(make=builtin.chatterbot_dialogues, read=read_chat),
    "chat-jsonl": Kind(make=link, read=read_chat),
}
