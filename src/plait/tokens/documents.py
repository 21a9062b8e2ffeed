"""Tokenised documents of a shard, in a temporary file: memory holds where each lies, and no more."""

import os
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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

    text: NDArray[Any]
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
        return counts(which, self.starts)


def counts(which: NDArray[np.bool_], bounds: Sequence[int]) -> list[int]:
    """How many are true between each bound and the next: quicker, slice by slice, than a sum of all."""
    if np.count_nonzero(which) == len(which):  # of texts without questions all are
        return np.diff(bounds).tolist()
    return [int(np.count_nonzero(which[start:end])) for start, end in pairwise(bounds)]


NO_PATCHES = np.full(1 << 16, -1, np.int32)
NO_PATCHES.flags.writeable = False


def no_patches(size: int) -> NDArray[np.int32]:
    """The patch indices of so many tokens of text."""
    return NO_PATCHES[:size] if size <= len(NO_PATCHES) else np.full(size, -1, np.int32)


BUFFER = 1 << 20
INDEX = np.dtype(np.int32).itemsize
"""Bytes of a patch's index in the file."""


class Documents:
    """Documents in a temporary file; read back by number, whole or in part.

    A batch's tokens stand there end to end, then its roles, a byte each, and then, of each document with
    pictures, the indices of its patches and the pictures.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        """Start with none.

        Args:
            dtype: of a token, in the file and of what is read from it.
        """
        self.dtype = dtype
        self._lengths, self._firsts = array("i"), array(dtype.char)
        self._texts, self._roles = array("q"), array("q")
        # of those with pictures only
        self._pictured, self._indices, self._first_picture = array("i"), array("q"), array("q", [0])
        self._patches, self._picture_ends = array("i"), array("q")
        self._end = 0
        self._spool = tempfile.TemporaryFile(buffering=BUFFER)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._spool.close()
        except OSError:  # what could not be written cannot be now
            if kind is None:
                raise

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document."""
        return np.array(self._lengths, np.int32)

    @property
    def pictured(self) -> NDArray[np.bool_]:
        """Whether each document has pictures."""
        found = np.zeros(len(self), bool)
        found[np.asarray(self._pictured, np.int32)] = True
        return found

    def tokens_at(self, documents: NDArray[np.int32], places: NDArray[np.int32]) -> NDArray[Any]:
        """The token at a place of each of some documents."""
        found = np.asarray(self._firsts, self.dtype)[documents]
        inner = np.flatnonzero(places)  # few: first tokens are in memory
        before = places[inner].astype(np.int64) * self.dtype.itemsize
        starts = np.asarray(self._texts, np.int64)[documents[inner]] + before
        read = b"".join(self._read(start, self.dtype.itemsize) for start in starts.tolist())
        found[inner] = np.frombuffer(read, self.dtype)
        return found

    def copy(
        self,
        stretches: NDArray[np.int64],
        places: NDArray[np.int64],
        text: NDArray[Any],
        role: NDArray[np.uint8],
    ) -> None:
        """Read stretches of documents to where they shall stand.

        Args:
            stretches: (n, 3) the number of a document, its first token to read, and the one behind the last.
            places: (n,) where each begins in the next two.
            text: (N,) gets the tokens, which are of this dtype.
            role: (N,) gets their roles.
        """
        documents, starts, ends = stretches.T
        file = self._spool.fileno()
        columns: tuple[tuple[NDArray[Any], array[int]], ...] = (text, self._texts), (role, self._roles)
        for column, begins in columns:
            size, room = column.itemsize, column.view(np.uint8).data
            offsets = np.asarray(begins, np.int64)[documents] + size * starts
            firsts, lasts = size * places, size * (places + ends - starts)
            for offset, first, last in zip(offsets.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
                os.preadv(file, [room[first:last]], offset)

    def extend(self, batch: Batch, numbers: Sequence[int]) -> None:
        """Take in those of a batch with these numbers; of the others, the file has tokens that none reads.

        Raises:
            OSError: the disk of temporary files is full; its folder is named.
        """
        try:
            self._extend(batch, numbers)
        except OSError as error:
            error.filename = tempfile.gettempdir()  # the file has no name
            raise

    def _extend(self, batch: Batch, numbers: Sequence[int]) -> None:
        before, bounds, kept = len(self), np.array(batch.starts, np.int64), np.array(numbers, np.int64)
        starts, lengths = bounds[kept], np.diff(bounds)[kept].astype(np.int32)
        firsts = np.zeros(len(numbers), self.dtype)
        firsts[lengths > 0] = batch.text[starts[lengths > 0]]
        text = self._write(batch.text.astype(self.dtype).data)
        role = self._write(batch.role.data)
        columns = (
            (self._lengths, lengths),
            (self._firsts, firsts),
            (self._texts, text + self.dtype.itemsize * starts),
            (self._roles, role + starts),
        )
        for column, values in columns:
            column.frombytes(values.tobytes())
        for place, number in enumerate(numbers, before):
            if batch.pictures[number]:
                self._pictured.append(place)
                self._extend_pictures(batch, number)
        self._spool.flush()

    def _extend_pictures(self, batch: Batch, number: int) -> None:
        """Take in the pictures of a document, and the indices of their patches."""
        self._indices.append(self._end)
        assert batch.patch_indices is not None
        self._write(batch.patch_indices[batch.starts[number] : batch.starts[number + 1]].data)
        for picture in batch.pictures[number]:
            self._write(picture.encoded)
            self._patches.append(picture.patches)
            self._picture_ends.append(self._end)
        self._first_picture.append(len(self._patches))

    def __getitem__(self, number: int) -> Document:
        """A document with its pictures' bytes."""
        size = self._lengths[number]
        text = np.frombuffer(self._read(self._texts[number], self.dtype.itemsize * size), self.dtype)
        role = np.frombuffer(self._read(self._roles[number], size), np.uint8)
        place = bisect_left(self._pictured, number)
        if self._pictured[place : place + 1] != array("i", [number]):
            return Document(text, role, no_patches(size), [])
        first, last = self._first_picture[place : place + 2]
        start = self._indices[place]
        begin = start + INDEX * size
        indices = np.frombuffer(self._read(start, begin - start), np.int32)
        begins = [begin, *self._picture_ends[first : last - 1]]
        pictures = [
            Picture(self._read(begin, self._picture_ends[which] - begin), self._patches[which])
            for begin, which in zip(begins, range(first, last), strict=True)
        ]
        return Document(text, role, indices, pictures)

    def _write(self, content: bytes | memoryview) -> int:
        """Where in the file the content begins."""
        start = self._end
        self._end += self._spool.write(content)
        return start

    def _read(self, start: int, size: int) -> bytes:
        """Bytes of the file."""
        return os.pread(self._spool.fileno(), size, start)
