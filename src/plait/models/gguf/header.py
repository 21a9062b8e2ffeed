"""Headers of GGUF files: values by key, and where each tensor stands.

A file is its magic, a version, two counts, the values, the tensors' names, shapes, types and offsets, and the
packed tensors (ggml's ``docs/gguf.md``). A header from anyone may say anything: every count is compared with
the bytes that are left before anything is read by it. Packed tensors themselves are unpacked by the library.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from plait.errors import CheckpointError
from plait.models.stored import read_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""How numbers stand in the file, by the code of their type."""
SINGLE, STRING, ARRAY = 6, 8, 9
ALIGNMENT = "general.alignment"
LIMIT, DIMENSIONS = 1 << 28, 4
"""Bytes of a header at most; vocabularies of millions of tokens have room in it."""
ADVICE = "download or copy the file again"


@dataclass(frozen=True)
class Packed:
    """A tensor in the file: rows of packed blocks, one after the other.

    ``shape`` is that of its elements, outermost first.
    """

    path: Path
    offset: int
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """Bytes of a row."""
        block, size = (int(one) for one in GGML_QUANT_SIZES[self.kind])
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return math.prod(self.shape[:-1]) * self.row

    def rows(self) -> "NDArray[np.uint8]":
        """The packed bytes: as many rows as the tensor has, of ``row`` bytes.

        Raises:
            CheckpointError: the file is cut off.
        """
        content = read_at(self.path, self.offset, self.nbytes)
        return np.frombuffer(content, dtype=np.uint8).reshape(-1, self.row)

    def unpacked(self, rows: "NDArray[np.uint8]") -> "NDArray[np.float32]":
        """Packed rows as numbers: as many rows of as many numbers as the tensor's last axis has.

        Raises:
            CheckpointError: nobody unpacks such blocks.
        """
        try:
            found: NDArray[np.float32] = dequantize(rows, self.kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path} is packed as {self.kind.name}, which the package gguf does not unpack",
                hint="take a file of another packing, e.g. Q8_0 or F16",
            ) from error
        return found


@dataclass(frozen=True)
class Header:
    """What a file says of itself, and its tensors by name."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, Packed]


def read(path: Path) -> Header:
    """Read a header, and check that what it says is what the file is.

    Raises:
        CheckpointError: it is no GGUF file, of another version, cut off, or does not describe itself.
    """
    with path.open("rb") as file:
        cursor = _Cursor(path, file, path.stat().st_size)
        tensor_count, value_count = _counts(cursor)
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.string()
            if key in values:
                raise broken(path, f"{key} stands in it twice")
            values[key] = cursor.value(key)
        alignment = values.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise broken(path, f"{ALIGNMENT} is {alignment!r}, expected a power of two from 8 on")
        listed = [_tensor(cursor) for _ in range(tensor_count)]
        start = -(-cursor.place // alignment) * alignment
    return Header(path, values, _placed(path, listed, start, alignment, cursor.size))


def _counts(cursor: "_Cursor") -> tuple[int, int]:
    """How many tensors and values follow; none can be smaller than what says that it is there."""
    if cursor.size < len(MAGIC) or cursor.take(len(MAGIC)) != MAGIC:
        raise CheckpointError(
            f"{cursor.path} is no GGUF file: it does not begin with {MAGIC.decode()}",
            hint="name a .gguf file of llama.cpp",
        )
    (version,) = cursor.numbers("I", 1)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"version {swapped}, big-endian" if swapped in VERSIONS else f"version {version}"
        raise CheckpointError(
            f"{cursor.path} is a GGUF file of {what}", hint=f"plait reads versions {VERSIONS}, little-endian"
        )
    tensors, values = cursor.numbers("Q", 2)
    for what, count, least in (("tensors", tensors, 24), ("values", values, 13)):
        cursor.room(count, least, f"{count} {what}")
    return tensors, values


def _tensor(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, code of its type and offset of a tensor."""
    name = cursor.string()
    (axes,) = cursor.numbers("I", 1)
    if not 1 <= axes <= DIMENSIONS:
        raise broken(cursor.path, f"{name} has {axes} axes")
    shape = cursor.numbers("Q", axes)
    (kind,) = cursor.numbers("I", 1)
    (offset,) = cursor.numbers("Q", 1)
    return name, tuple(reversed(shape)), kind, offset


def _placed(
    path: Path, listed: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> dict[str, Packed]:
    """The tensors, if each has a place of its own in the file.

    Raises:
        CheckpointError: one has not, or is of a type that nobody knows.
    """
    found: dict[str, Packed] = {}
    for name, shape, code, offset in listed:
        kind = _kind(path, name, code)
        block = GGML_QUANT_SIZES[kind][0]
        if name in found:
            raise broken(path, f"{name} stands in it twice")
        if min(shape) < 1 or shape[-1] % block or offset % alignment:
            raise broken(path, f"{name} of shape {shape} at {offset} is not made of {kind.name} blocks")
        found[name] = Packed(path, start + offset, kind, shape)
    end = start
    for name, one in sorted(found.items(), key=lambda item: item[1].offset):
        if one.offset < end:
            raise broken(path, f"{name} begins at byte {one.offset}, where the one before it ends at {end}")
        end = one.offset + one.nbytes
        if end > size:
            raise broken(path, f"{name} ends at byte {end}, and it has {size}")
    return found


def _kind(path: Path, name: str, code: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(code)
    except ValueError as error:
        raise broken(path, f"{name} is packed in a way of number {code}, which nobody knows") from error


def broken(path: Path, what: str) -> CheckpointError:
    """The sentence about a file that is not what it says."""
    return CheckpointError(f"{path} is no whole GGUF file: {what}", hint=ADVICE)


class _Cursor:
    """A place in the header; what is asked for is compared with what is left first."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.place = 0

    def room(self, count: int, size: int, what: str) -> None:
        """Refuse what the rest of the file, or a header, has no room for."""
        left = min(self.size, LIMIT) - self.place
        if count * size > left:
            raise broken(
                self.path, f"{what} at byte {self.place} of its header have no room in {self.size} bytes"
            )

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.room(count, 1, f"{count} bytes")
        self.place += count
        return self.file.read(count)

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        """The next numbers of a type of :mod:`struct`."""
        self.room(count, struct.calcsize(f"<{code}"), f"{count} numbers")
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def string(self) -> str:
        """The next text."""
        (length,) = self.numbers("Q", 1)
        content = self.take(length)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise broken(self.path, f"the text at byte {self.place - length} is not UTF-8") from error

    def value(self, key: str) -> Any:
        """The next value with the code of its type before it."""
        (kind,) = self.numbers("I", 1)
        if kind != ARRAY:
            return self._values(kind, 1, key)[0]
        inner, count = *self.numbers("I", 1), *self.numbers("Q", 1)
        return self._values(inner, count, key)

    def _values(self, kind: int, count: int, key: str) -> list[Any]:
        if kind == STRING:
            self.room(count, 8, f"{count} texts of {key}")
            return [self.string() for _ in range(count)]
        if kind not in NUMBERS:
            raise broken(self.path, f"{key} is of type {kind}, which nobody knows")
        found = self.numbers(NUMBERS[kind], count)
        # A float32 is told as the shortest decimal that is rounded to it, as it was written: 1e-05.
        return [float(str(np.float32(one))) for one in found] if kind == SINGLE else list(found)
