"""Tokenised documents of a shard, in a temporary file: memory holds where each lies, and no more."""

import os
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file and the number of its patches."""

    encoded: bytes
    patches: int


@dataclass(frozen=True, slots=True)
class Document:
    """The n tokens of a conversation. ``patch_indices`` counts through all its pictures' patches."""

    text: NDArray[np.int32]
    role: NDArray[np.uint8]
    patch_indices: NDArray[np.int32]
    pictures: Sequence[Picture]

    def __len__(self) -> int:
        return len(self.text)

    def part(self, start: int, end: int) -> "Document":
        """The tokens from ``start`` up to ``end`` as a document of its own.

        It keeps the pictures that any of its tokens is a patch of, its indices counted anew: a
        picture that is cut through stays whole on both sides.
        """
        if (start, end) == (0, len(self)):
            return self
        indices = self.patch_indices[start:end]
        used = indices[indices >= 0]
        kept: Sequence[Picture] = ()
        if used.size:
            ends = np.cumsum([picture.patches for picture in self.pictures])
            first, last = np.searchsorted(ends, used[[0, -1]], side="right")
            kept = self.pictures[first : last + 1]
            indices = np.where(indices >= 0, indices - ends[first] + kept[0].patches, -1).astype(np.int32)
        return Document(self.text[start:end], self.role[start:end], indices, kept)


@dataclass(frozen=True)
class Batch(Sequence[Document]):
    """Documents end to end: N tokens of D documents.

    Attributes:
        text: (N,) token ids.
        role: (N,) codes.
        starts: the first token of each document, and N.
        patch_indices: (N,), each document's counted by itself; None where none has pictures.
        pictures: of each document.
    """

    text: NDArray[np.int32]
    role: NDArray[np.uint8]
    starts: Sequence[int]
    patch_indices: NDArray[np.int32] | None
    pictures: Sequence[Sequence[Picture]]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Self:
        """Documents that there are, as a batch."""
        indices = [one.patch_indices for one in documents]
        return cls(
            np.concatenate([one.text for one in documents]),
            np.concatenate([one.role for one in documents]),
            [0, *accumulate(map(len, documents))],
            np.concatenate(indices) if any(one.pictures for one in documents) else None,
            [one.pictures for one in documents],
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        start, end = self.starts[range(len(self))[number]], self.starts[range(1, len(self) + 1)[number]]
        indices = no_patches(end - start) if self.patch_indices is None else self.patch_indices[start:end]
        return Document(self.text[start:end], self.role[start:end], indices, self.pictures[number])

    def counts(self, which: NDArray[np.bool_]) -> list[int]:
        """How many of each document's tokens are so: ``which`` is (N,)."""
        return [int(np.count_nonzero(which[start:end])) for start, end in pairwise(self.starts)]


NO_PATCHES = np.full(1 << 16, -1, np.int32)
NO_PATCHES.flags.writeable = False


def no_patches(size: int) -> NDArray[np.int32]:
    """The patch indices of so many tokens of text."""
    return NO_PATCHES[:size] if size <= len(NO_PATCHES) else np.full(size, -1, np.int32)


BUFFER = 1 << 20
TOKEN = np.dtype(np.int32).itemsize
"""Bytes of a token in the file. Behind a document's tokens are its roles, a byte each, and, of one with
pictures, the indices of its patches, then the pictures."""


class Documents:
    """Documents end to end; read back by number."""

    def __init__(self) -> None:
        """Start with none."""
        self._lengths, self._starts = array("q"), array("q")
        self._patches = array("q")
        self._picture_ends, self._first_picture = array("q"), array("q", [0])
        self._end = 0
        self._spool = tempfile.TemporaryFile(buffering=BUFFER)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.array(self._lengths, np.int64)

    def tokens_at(self, documents: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int32]:
        """The token at a place of each of some documents."""
        starts = np.array(self._starts, np.int64)[documents] + places * TOKEN
        return np.frombuffer(b"".join(self._read(start, TOKEN) for start in starts.tolist()), np.int32)

    def extend(self, batch: Batch, numbers: Sequence[int]) -> None:
        """Take in those of a batch with these numbers."""
        columns: list[tuple[NDArray[Any] | None, int]]
        columns = [(batch.text, TOKEN), (batch.role, 1), (batch.patch_indices, TOKEN)]
        views = [(memoryview(one.tobytes()), size) for one, size in columns if one is not None]
        for number in numbers:
            start, end = batch.starts[number], batch.starts[number + 1]
            pictures = batch.pictures[number]
            self._lengths.append(end - start)
            self._starts.append(self._end)
            for view, size in views if pictures else views[:2]:
                self._write(view[size * start : size * end])
            for picture in pictures:
                self._write(picture.encoded)
                self._patches.append(picture.patches)
                self._picture_ends.append(self._end)
            self._first_picture.append(len(self._patches))
        self._spool.flush()

    def __getitem__(self, number: int) -> Document:
        """A document with its pictures' bytes."""
        size, start = self._lengths[number], self._starts[number]
        first, last = self._first_picture[number], self._first_picture[number + 1]
        width = TOKEN + 1 + (TOKEN if last > first else 0)
        content = self._read(start, size * width)
        text = np.frombuffer(content, np.int32, size)
        role = np.frombuffer(content, np.uint8, size, TOKEN * size)
        if last == first:
            return Document(text, role, no_patches(size), [])
        indices = np.frombuffer(content[(TOKEN + 1) * size :], np.int32)
        begins = [start + size * width, *self._picture_ends[first : last - 1]]
        pictures = [
            Picture(self._read(begin, self._picture_ends[which] - begin), self._patches[which])
            for begin, which in zip(begins, range(first, last), strict=True)
        ]
        return Document(text, role, indices, pictures)

    def _write(self, content: bytes | memoryview) -> None:
        self._end += self._spool.write(content)

    def _read(self, start: int, size: int) -> bytes:
        """Bytes of the file."""
        return os.pread(self._spool.fileno(), size, start)
