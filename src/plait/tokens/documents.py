"""Tokenised documents of a shard, in temporary files: only how long each is stays in memory."""

import os
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from plait.tokens.roles import IMAGE


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


class Documents:
    """Documents end to end in temporary files; read back by number."""

    def __init__(self) -> None:
        """Start with none."""
        self._text_ends, self._picture_ends = array("q", [0]), array("q", [0])
        self._patches, self._first_picture = array("q"), array("q", [0])
        with ExitStack() as stack:
            self._text, self._role, self._spool = (
                stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)
            )
            self._files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def __len__(self) -> int:
        return len(self._text_ends) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        ends = np.array(self._text_ends, np.int64)
        return ends[1:] - ends[:-1]

    def tokens_at(self, documents: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int32]:
        """The token at a place of each of some documents."""
        starts = np.array(self._text_ends, np.int64)[documents] + places
        found = [_read(self._text, int(start), int(start) + 1, np.int32) for start in starts]
        return np.concatenate([np.empty(0, np.int32), *found])

    def append(self, document: Document) -> None:
        """Take a document in, whose patches are those of its tokens of the role IMAGE, in their order."""
        self._text.write(np.ascontiguousarray(document.text, np.int32).data)
        self._role.write(np.ascontiguousarray(document.role, np.uint8).data)
        self._text_ends.append(self._text_ends[-1] + len(document))
        for picture in document.pictures:
            self._spool.write(picture.encoded)
            self._patches.append(picture.patches)
            self._picture_ends.append(self._picture_ends[-1] + len(picture.encoded))
        self._first_picture.append(len(self._patches))

    def __getitem__(self, number: int) -> Document:
        """A document with its pictures' bytes."""
        start, end = self._text_ends[number : number + 2]
        text, role = _read(self._text, start, end, np.int32), _read(self._role, start, end, np.uint8)
        pictures = [
            self._picture(picture)
            for picture in range(self._first_picture[number], self._first_picture[number + 1])
        ]
        indices = np.full(end - start, -1, np.int32)
        if pictures:
            shown = np.flatnonzero(role == IMAGE)
            indices[shown] = np.arange(len(shown))
        return Document(text, role, indices, pictures)

    def _picture(self, number: int) -> Picture:
        start, end = self._picture_ends[number : number + 2]
        return Picture(_read(self._spool, start, end, np.uint8).tobytes(), self._patches[number])


def _read(file: BinaryIO, start: int, end: int, dtype: type[np.generic]) -> NDArray[Any]:
    """Elements of a file that is still written to."""
    size = np.dtype(dtype).itemsize
    file.flush()
    return np.frombuffer(os.pread(file.fileno(), (end - start) * size, start * size), dtype)
