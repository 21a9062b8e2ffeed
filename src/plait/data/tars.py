"""Tars of samples: files that stand together and have one key are a sample's parts.

What a reader would pass over without a word is found here: a cut, a second tar behind the first, links,
parts of one name. What is written is plain ustar, and follows from keys and parts alone.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from plait.errors import DataError

MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
"""Key and part of a file in a tar: a key ends at the first dot of the file's name."""
PLAIN = re.compile(
    rb".{24}([0-7]{11})[\0 ].{12}(([0-7]{6})\0 )0\0{100}ustar\x0000.{80}\0{155}.{12}", re.DOTALL
)
"""What follows the name in the header of a file: its length, and the checksum."""
META_MEMBER = re.compile(r"__[^/]*__(/|$)")
TAR_BLOCK = 512
CHUNK = 1 << 20

Parts = dict[str, bytes]

# Writing

NAME_SIZE = 100
OWNER = b"0000644\0" + b"0000000\0" * 2
"""Mode, user and group."""
TIME, SUM = b"%011o\0" % 0, b"%06o\0 "
KIND = b"0".ljust(101, b"\0") + b"ustar\x0000" + bytes(247)
"""A file with bytes of its own, without names of its owners."""
REST = sum(OWNER + TIME + b" " * 8 + KIND)
"""What all of a header but name and size adds to its checksum."""
RECORD = 20 * TAR_BLOCK
"""A tar's size is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sample stands in a tar, in bytes.

    Attributes:
        start, end: from its first header to behind its last part.
        parts: name, first byte and length of each.
    """

    start: int
    end: int
    parts: list[tuple[str, int, int]]


class TarWriter:
    """Writes samples to a tar, one at a time."""

    def __init__(self, path: Path) -> None:
        """Begin a tar; folders above it are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._end = path.open("wb"), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                whole = self._end + 2 * TAR_BLOCK
                self._file.write(bytes(whole + -whole % RECORD - self._end))

    def add(self, key: str, parts: Parts) -> Entry:
        """Write a sample; ``KEY.PART`` is at most 100 letters of ASCII."""
        start, blocks, places = self._end, [], []
        for name, content in parts.items():
            size = len(content)
            places.append((name, self._end + TAR_BLOCK, size))
            blocks += [_header(f"{key}.{name}".encode("ascii"), size), content, bytes(-size % TAR_BLOCK)]
            self._end += TAR_BLOCK + size + -size % TAR_BLOCK
        self._file.write(b"".join(blocks))
        return Entry(start, self._end, places)


def _header(name: bytes, size: int) -> bytes:
    """The block before a file's bytes, as POSIX lays it out."""
    length = b"%011o\0" % size
    checksum = SUM % (sum(name) + sum(length) + REST)
    return b"".join((name.ljust(NAME_SIZE, b"\0"), OWNER, length, TIME, checksum, KIND))


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
        DataError: the tar is damaged or cut short, or neighbours have one key.
    """
    import tarfile

    try:
        with path.open("rb") as file:
            entries = _Entries(file, path)
            for key, members in groupby(_members(entries), key=lambda member: member[0]):
                found: dict[str, tuple[int, int]] = {}
                for _, name, place in members:
                    if name in found:
                        raise DataError(
                            f"{path}: the key {key!r} has the part {name} twice",
                            hint="readers merge neighbours of one key: give samples keys of their own",
                        )
                    found[name] = place
                _check_name(path, ".".join((key, *found)))
                yield key, found
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is damaged or no tar: {error}", hint="write or download the shard again"
        ) from error
    _check_end(path, entries.end)


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


class _Entries:
    """Name, first byte and length of each file of a tar; what is no plain header is tarfile's to read.

    Attributes:
        end: where the last one ends, once all were given.

    Raises:
        DataError: a sample's file is a link, whose bytes stand elsewhere, or sparse, with holes.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.end = file, path, 0

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        import tarfile

        while found := _plain(os.pread(self.file.fileno(), TAR_BLOCK, self.end)):
            name, size = found
            yield name, self.end + TAR_BLOCK, size
            self.end += TAR_BLOCK + size + -size % TAR_BLOCK
        self.file.seek(self.end)
        with tarfile.open(fileobj=self.file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined] # or it would keep every one of them
                if info.isreg() and not info.issparse():
                    yield info.name, info.offset_data, info.size
                elif not info.isdir() and _of_sample(info.name):
                    raise DataError(
                        f"{self.path}: {info.name} is a link, a device or sparse: its bytes are not in it",
                        hint="write the shard again; GNU tar: --dereference --hard-dereference, no --sparse",
                    )
            self.end = tar.offset


def _plain(header: bytes) -> tuple[str, int] | None:
    """Name and length of a file by a header of POSIX's, without a prefix; None where it is another one."""
    found = PLAIN.fullmatch(header, NAME_SIZE)
    if not found or int(found[3], 8) != sum(header) - sum(found[2]) + sum(b" " * len(found[2])):
        return None
    name = header[:NAME_SIZE].partition(b"\0")[0]
    return name.decode("utf-8", "surrogateescape"), int(found[1], 8)


def _of_sample(name: str) -> re.Match[str] | None:
    """Key and part of a file, if it is a sample's."""
    return None if META_MEMBER.match(name) else MEMBER.fullmatch(name)


def _members(entries: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Key, part and place of every file that is a sample's, as webdataset and energon name them."""
    for name, start, size in entries:
        found = _of_sample(name)
        if found:
            yield found[1], found[2], (start, size)


def _check_name(path: Path, name: str) -> None:
    """Refuse bytes that are no text: no record could name them."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}: the name {name!r} is not UTF-8", hint="write the shard again with names in UTF-8"
        ) from error


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
