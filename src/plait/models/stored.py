"""A tensor that stands in a file: where its bytes are, and reading them without mapping the file."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of an element, by torch's name of its type."""


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes, row by row, from ``offset`` of a file on."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return math.prod(self.shape) * self.itemsize

    def tensor(self) -> "Tensor":
        """Read it.

        Raises:
            CheckpointError: the file is cut off.
        """
        import torch

        content = read_at(self.path, self.offset, self.nbytes)
        dtype = getattr(torch, self.dtype)
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.reshape(self.shape)


def read_at(path: Path, offset: int, size: int) -> bytearray:
    """So many bytes of a file.

    Raises:
        CheckpointError: the file is cut off.
    """
    content = bytearray(size)
    with path.open("rb") as file:
        read_into(file.fileno(), offset, memoryview(content), path)
    return content


class StoredTensors(Mapping[str, "Tensor"]):
    """Tensors in files, each read when it is asked for."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        """Take where they stand."""
        self.stored = stored

    def __getitem__(self, name: str) -> "Tensor":
        return self.stored[name].tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def read_into(fd: int, offset: int, room: memoryview, path: Path) -> None:
    """Fill a buffer from a place in a file.

    Raises:
        CheckpointError: the file ends before.
    """
    done = 0
    while done < len(room):
        count = os.preadv(fd, [room[done:]], offset + done)
        if not count:
            raise CheckpointError(
                f"{path} ends at byte {offset + done}, {len(room) - done} bytes before a tensor does",
                hint="the file is cut off: copy or make it anew",
            )
        done += count


def write_from(fd: int, offset: int, content: memoryview) -> None:
    """Write a buffer to a place in a file."""
    done = 0
    while done < len(content):
        done += os.pwrite(fd, content[done:], offset + done)
