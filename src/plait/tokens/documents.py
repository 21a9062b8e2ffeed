"""Tokenised documents of a shard, in a temporary file: memory holds where each lies, and no more."""

import os
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from plait import files
from plait.tokens.roles import ASSISTANT, IMAGE, trained


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
        sizes: (R,) tokens of each run of one role; a document has one run at least.
        codes: (R,) its role, which is not that of pictures' patches in it.
        runs: (D + 1,) the first run of each document, and R.
        patch_indices: (N,), each document's counted by itself; None where none has pictures.
        pictures: of each document.
    """

    text: NDArray[np.int32]
    sizes: NDArray[np.int32]
    codes: NDArray[np.uint8]
    runs: NDArray[np.int64]
    patch_indices: NDArray[np.int32] | None
    pictures: Sequence[Sequence[Picture]]

    @cached_property
    def starts(self) -> list[int]:
        """The first token of each document, and N."""
        found: list[int] = _running(self.sizes)[self.runs].tolist()
        return found

    @cached_property
    def role(self) -> NDArray[np.uint8]:
        """(N,) the code of each token."""
        return _roles(self.codes, self.sizes, self.patch_indices)

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

    def trained(self, vision: Mapping[str, int]) -> list[int]:
        """How many of each document's tokens an assistant wrote, picture markup left out."""
        if vision:
            return self.counts(trained(self.text, self.role, vision))
        own = np.where(self.codes == ASSISTANT, self.sizes, 0)
        found: list[int] = np.diff(_running(own)[self.runs]).tolist()
        return found


def _roles(
    codes: NDArray[np.uint8], sizes: NDArray[np.int32], patch_indices: NDArray[np.int32] | None
) -> NDArray[np.uint8]:
    """The code of each token of runs that are end to end."""
    role = np.repeat(codes, sizes)
    if patch_indices is not None:
        role[patch_indices >= 0] = IMAGE
    return role


def _running(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Where each begins that has such a size, and where the last ends."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _chosen(
    bounds: NDArray[np.int64], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The runs of some documents, one after another, and where each one's begin among them and end.

    Args:
        bounds: the first run of each document, and their number.
        numbers: those of the documents.
    """
    first, counts = bounds[numbers], bounds[numbers + 1] - bounds[numbers]
    places = _running(counts)
    return np.repeat(first - places[:-1], counts) + np.arange(places[-1]), places


def counts(which: NDArray[np.bool_], bounds: Sequence[int]) -> list[int]:
    """How many are true between each bound and the next: quicker, slice by slice, than a sum of all."""
    if np.count_nonzero(which) == len(which):  # of texts without questions all are
        return np.diff(bounds).tolist()
    return [int(np.count_nonzero(which[start:end])) for start, end in pairwise(bounds)]


def no_patches(size: int) -> NDArray[np.int32]:
    """The patch indices of so many tokens of text, which cannot be written to."""
    return np.broadcast_to(np.int32(-1), size)


BUFFER = 1 << 20
INDEX = np.dtype(np.int32).itemsize
"""Bytes of a patch's index in the file."""


class Documents:
    """Documents in a temporary file; read back by number, whole or in part.

    A batch's tokens stand there end to end and then, of each document with pictures, the indices of its
    patches and the pictures. Runs of one role are in memory.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        """Start with none.

        Args:
            dtype: of a token, in the file and of what is read from it.
        """
        self.dtype = dtype
        self._lengths, self._firsts = array("i"), array(dtype.char)
        self._texts = array("q")
        self._runs, self._sizes, self._codes = array("q", [0]), array("i"), array("B")
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

    def copy(self, stretches: NDArray[np.int64], places: NDArray[np.int64], text: NDArray[Any]) -> None:
        """Read stretches of documents to where they shall stand.

        Args:
            stretches: (n, 3) the number of a document, its first token to read, and the one behind the last.
            places: (n,) where each begins in the next.
            text: (N,) gets the tokens, which are of this dtype.
        """
        documents, starts, ends = stretches.T
        file, size, room = self._spool.fileno(), text.itemsize, text.view(np.uint8).data
        offsets = np.asarray(self._texts, np.int64)[documents] + size * starts
        firsts, lasts = size * places, size * (places + ends - starts)
        for offset, first, last in zip(offsets.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            os.preadv(file, [room[first:last]], offset)

    def roles(self, stretches: NDArray[np.int64], before: NDArray[np.int8]) -> NDArray[np.uint16]:
        """The codes of stretches of documents end to end; pictures' patches have those of the runs around.

        Args:
            stretches: (n, 3) as above.
            before: (n,) places that are left before each, which get any code.
        """
        documents, starts, ends = stretches.T
        which, places = _chosen(np.asarray(self._runs, np.int64), documents)
        first, counts = places[:-1], np.diff(places)
        begins = _running(np.asarray(self._sizes, np.int32)[which])
        opening = begins[first]
        low, high = (np.repeat(opening + one, counts) for one in (starts, ends))
        sizes = np.clip(begins[1:], low, high) - np.clip(begins[:-1], low, high)
        sizes[first] += before
        return np.repeat(np.asarray(self._codes, np.uint8)[which].astype(np.uint16), sizes)

    def extend(self, batch: Batch, numbers: Sequence[int]) -> None:
        """Take in those of a batch with these numbers; of the others, the file has tokens that none reads.

        Raises:
            OSError: the disk of temporary files is full; its folder is named.
        """
        with files.temporary():
            self._extend(batch, numbers)

    def _extend(self, batch: Batch, numbers: Sequence[int]) -> None:
        before, bounds, kept = len(self), np.array(batch.starts, np.int64), np.array(numbers, np.int64)
        starts, lengths = bounds[kept], np.diff(bounds)[kept].astype(np.int32)
        firsts = np.zeros(len(numbers), self.dtype)
        firsts[lengths > 0] = batch.text[starts[lengths > 0]]
        text = self._write(batch.text.astype(self.dtype).data)
        which, places = _chosen(batch.runs, kept)
        columns = (
            (self._lengths, lengths),
            (self._firsts, firsts),
            (self._texts, text + self.dtype.itemsize * starts),
            (self._runs, self._runs[-1] + places[1:]),
            (self._sizes, batch.sizes[which]),
            (self._codes, batch.codes[which]),
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
        mine = slice(*self._runs[number : number + 2])
        sizes, codes = np.array(self._sizes[mine], np.int32), np.array(self._codes[mine], np.uint8)
        place = bisect_left(self._pictured, number)
        if self._pictured[place : place + 1] != array("i", [number]):
            return Document(text, _roles(codes, sizes, None), no_patches(size), [])
        first, last = self._first_picture[place : place + 2]
        start = self._indices[place]
        begin = start + INDEX * size
        indices = np.frombuffer(self._read(start, begin - start), np.int32)
        begins = [begin, *self._picture_ends[first : last - 1]]
        pictures = [
            Picture(self._read(begin, self._picture_ends[which] - begin), self._patches[which])
            for begin, which in zip(begins, range(first, last), strict=True)
        ]
        return Document(text, _roles(codes, sizes, indices), indices, pictures)

    def _write(self, content: bytes | memoryview) -> int:
        """Where in the file the content begins."""
        start = self._end
        self._end += self._spool.write(content)
        return start

    def _read(self, start: int, size: int) -> bytes:
        """Bytes of the file."""
        return os.pread(self._spool.fileno(), size, start)
