"""Tars of samples: files that stand together and have one key are a sample's parts.

What a reader would pass over without a word is found here: a cut, a second tar behind the first, links,
parts of one name.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from plait.errors import DataError

MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
"""Key and part of a file in a tar: a key ends at the first dot of the file's name."""
META_MEMBER = re.compile(r"__[^/]*__(/|$)")
TAR_BLOCK = 512
CHUNK = 1 << 20

Parts = dict[str, bytes]


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
        DataError: the tar is damaged or cut short, or neighbours have one key.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in groupby(_members(tar, path), key=lambda member: member[0]):
                found: dict[str, tuple[int, int]] = {}
                for _, name, info in members:
                    if name in found:
                        raise DataError(
                            f"{path}: the key {key!r} has the part {name} twice",
                            hint="readers merge neighbours of one key: give samples keys of their own",
                        )
                    found[name] = (info.offset_data, info.size)
                yield key, found
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is damaged or no tar: {error}", hint="write or download the shard again"
        ) from error
    _check_end(path, end)


def parts_at(path: Path, found: Mapping[str, Sequence[int]]) -> Parts:
    """The parts of one sample, by :func:`places`.

    Raises:
        DataError: the tar has become shorter.
    """
    with path.open("rb") as file:
        parts = {name: os.pread(file.fileno(), size, offset) for name, (offset, size) in found.items()}
    if any(len(parts[name]) != size for name, (_, size) in found.items()):
        raise DataError(f"{path} is cut short", hint="write or download the shard again")
    return parts


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, part and entry of every file that is a sample's, as webdataset and energon name them.

    Raises:
        DataError: one is a link: its bytes stand elsewhere, and readers pass it over without a word.
    """
    for info in tar:
        tar.members = []  # type: ignore[attr-defined] # or it would keep every one of them
        name = MEMBER.fullmatch(info.name)
        if info.isdir() or not name or META_MEMBER.match(info.name):
            continue
        if not info.isreg():
            raise DataError(
                f"{path}: {info.name} is a link or a device, no file with bytes of its own",
                hint="write the shard again; GNU tar: --dereference --hard-dereference",
            )
        yield name[1], name[2], info


def _check_end(path: Path, end: int) -> None:
    """A whole tar ends with two blocks of zeros: without them an unknown number of samples is lost.

    Behind them is nothing but zeros, or a second tar was joined to the first: no reader goes on there.
    """
    with path.open("rb") as file:
        file.seek(end)
        if file.read(2 * TAR_BLOCK) != bytes(2 * TAR_BLOCK):
            raise DataError(f"{path} is cut short: it has no end", hint="write or download the shard again")
        while more := file.read(CHUNK):
            if more.strip(b"\0"):
                raise DataError(
                    f"{path} goes on behind its end, where no reader looks",
                    hint="tars cannot be joined by cat: keep them apart, or join them by tar --concatenate",
                )
