"""Tokenised documents of a shard: columns of numpy, pictures in a temporary file.

A shard's tokens are held in memory, 7 bytes each; its pictures are not.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

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


class Documents:
    """Documents end to end; read back by number."""

    def __init__(self) -> None:
        """Start with none."""
        self._tokens: list[tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int32]]] = []
        self._patches: list[int] = []
        self._picture_ends: list[int] = [0]
        self._first_picture: list[int] = [0]
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.array([len(text) for text, _, _ in self._tokens], np.int64)

    def tokens_at(self, documents: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int32]:
        """The token at a place of each of some documents."""
        pairs = zip(documents.tolist(), places.tolist(), strict=True)
        return np.array([self._tokens[number][0][place] for number, place in pairs], np.int32)

    def append(self, document: Document) -> None:
        """Take a document in."""
        self._tokens.append((document.text, document.role, document.patch_indices))
        for picture in document.pictures:
            self._spool.write(picture.encoded)
            self._patches.append(picture.patches)
            self._picture_ends.append(self._picture_ends[-1] + len(picture.encoded))
        self._first_picture.append(len(self._patches))

    def __getitem__(self, number: int) -> Document:
        """A document with its pictures' bytes."""
        text, role, indices = self._tokens[number]
        pictures = [
            self._picture(picture)
            for picture in range(self._first_picture[number], self._first_picture[number + 1])
        ]
        return Document(text, role, indices, pictures)

    def _picture(self, number: int) -> Picture:
        start, end = self._picture_ends[number : number + 2]
        self._spool.seek(start)
        return Picture(self._spool.read(end - start), self._patches[number])
