"""Files of the user's that a raw source links: found by their names, and unchanged ever after."""

import logging
from pathlib import Path
from typing import Any

from plait import files
from plait.config.paths import NAMES, local
from plait.errors import DataError
from plait.fetch.lfs import refuse_pointers

log = logging.getLogger(__name__)

EXPECTED = {
    "chat-jsonl": ".jsonl, .jsonl.gz, .jsonl.lz4 or .jsonl.zst",
    "tars": ".tar",
    "energon": ".tar, and .nv-meta with dataset.yaml",
    "files": ".jsonl, .json, plain or .gz, .lz4, .zst, .parquet, or .tar",
}


def origin(path: str) -> Path:
    """Where the user's files are.

    Raises:
        DataError: there is nothing.
    """
    place = local(path)
    if not place.exists():
        hint = "paths of datasets.*.source in config/ are taken from the folder where you run plait"
        raise DataError(f"{path} does not exist", hint=hint)
    return place


def link(path: str, folder: Path, kind: str) -> tuple[list[str], int]:
    """Link the files of a kind that the user has somewhere; their names, and how many others there are.

    Raises:
        DataError: there is no such path, or none of its files is of the kind.
    """
    place, names = origin(path), NAMES[kind]
    base = place if place.is_dir() else place.parent
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    wanted = [one for one in found if names.fullmatch(one.name) and one.is_file()]
    if not wanted:
        raise DataError(f"{path} holds none of the files that are read", hint=f"expected {EXPECTED[kind]}")
    refuse_pointers(wanted)
    for one in wanted:
        there = folder / one.relative_to(base)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(one.resolve())
    others = sum(one.is_file() for one in found) - len(wanted)
    if others:
        log.info("%s: %d files of other kinds are left alone", path, others)
    return [one.relative_to(base).as_posix() for one in wanted], others


def check_unchanged(path: Path, entry: dict[str, Any]) -> None:
    """A linked file may have been edited since its digest was recorded.

    Raises:
        DataError: it was, or it is gone.
    """
    if not path.is_file():
        where = path.readlink() if path.is_symlink() else path
        raise DataError(
            f"{path} is gone", hint=f"put {where} back, or remove {path.parent} and make it again"
        )
    if path.stat().st_size != entry["bytes"] or files.digest(path) != entry["sha256"]:
        sentence = f"{path} is not the file of {entry['bytes']} bytes that became a raw source"
        raise DataError(sentence, hint=f"remove {path.parent} and ask for it again")
