"""Packs laid out token by token, some at a time, and written as the files of an indexed shard."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from plait.data.images import patches
from plait.progress import bar
from plait.tokens import indexed
from plait.tokens.documents import Documents, Picture, counts, no_patches
from plait.tokens.pack import Packing, Pieces
from plait.tokens.render import Renderer
from plait.tokens.roles import IMAGE, PACK_SEP, trained

AT_ONCE = 1 << 20
"""Tokens of packs that are laid out and written at once."""


@dataclass(frozen=True)
class Laid:
    """Packs end to end: N tokens of P packs.

    Attributes:
        text: (N,) token ids.
        role: (N,) codes: PACK_SEP is that of the first token of each document but the first of a pack, the
            separator that it begins with, or one put before it.
        starts: (P,) where each pack begins.
        indices: (N,) of patches, counted through all pictures of a pack.
        pictures: of each pack, P times, which are read when they are asked for; ``role`` and ``indices`` are
            whole after that.
    """

    text: NDArray[Any]
    role: NDArray[np.uint16]
    starts: NDArray[np.int64]
    indices: NDArray[np.int32]
    pictures: Iterator[list[Picture]]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each pack."""
        return np.diff(self.starts, append=len(self.text))

    def counts(self, which: NDArray[np.bool_]) -> list[int]:
        """How many of each pack's tokens are so: ``which`` is (N,)."""
        return counts(which, [*self.starts.tolist(), len(self.text)])


@dataclass(frozen=True)
class Packs:
    """The packs of documents, as they shall be written."""

    documents: Documents
    cuts: Pieces
    packing: Packing
    separator: int

    @cached_property
    def _pictured(self) -> NDArray[np.bool_]:
        return self.documents.pictured

    def __iter__(self) -> Iterator[Laid]:
        """All packs, so many at a time that they have some AT_ONCE tokens."""
        many = max(AT_ONCE // self.packing.limit, 1)
        for first in bar(range(0, len(self.packing), many), "packs", f" times {many} packs"):
            yield self.laid(first, min(first + many, len(self.packing)))

    def laid(self, first: int, last: int) -> Laid:
        """The packs from ``first`` up to ``last``, of which there is one at least."""
        offsets = self.packing.offsets[first : last + 1]
        pieces, opening = self.packing.order[offsets[0] : offsets[-1]], offsets[:-1] - offsets[0]
        put = self.packing.separators[pieces]
        put[opening] = 0
        lengths = self.packing.lengths[pieces]
        places = np.cumsum(put + lengths, dtype=np.int64) - lengths
        text = np.empty(places[-1] + lengths[-1], self.documents.dtype)
        text[places[put > 0] - 1] = self.separator
        columns = (self.cuts.document, self.cuts.start, self.cuts.end)
        stretches = np.column_stack([column[pieces] for column in columns]).astype(np.int64)
        self.documents.copy(stretches, places, text)
        role = self.documents.roles(stretches, put)
        role[np.delete(places - put, opening)] = PACK_SEP
        indices = no_patches(len(text))
        if self._pictured[stretches[:, 0]].any():
            indices = indices.copy()
        shown = np.split(np.column_stack([stretches, places]), opening[1:])
        pictures = (self._pictures(one, indices, role) for one in shown)
        return Laid(text, role, places[opening], indices, pictures)

    def _pictures(
        self, pieces: NDArray[np.int64], indices: NDArray[np.int32], role: NDArray[np.uint16]
    ) -> list[Picture]:
        """The pictures of a pack; ``indices`` and ``role`` get those of their patches."""
        found: list[Picture] = []
        before = 0
        for number, start, end, place in pieces[self._pictured[pieces[:, 0]]].tolist():
            document = self.documents[number].part(start, end)
            own = document.patch_indices
            inside = slice(place, place + len(own))
            indices[inside] = np.where(own >= 0, own + before, -1)
            role[inside][own >= 0] = IMAGE
            found += document.pictures
            before += sum(picture.patches for picture in document.pictures)
        return found


class PackWriter:
    """Writes packs to the files of an indexed shard."""

    def __init__(self, folder: Path, renderer: Renderer, form: Mapping[str, Any], dtype: DTypeLike) -> None:
        """Start the files; ``dtype`` is that of a token."""
        self.renderer = renderer
        self.grid = {key: form[key] for key in ("patch_size", "max_resolution")}
        self.encoded = form["pictures"] == "encoded"
        with ExitStack() as stack:

            def opened(name: str, dtype: DTypeLike) -> indexed.IndexedWriter:
                return stack.enter_context(indexed.IndexedWriter(folder / name, dtype))

            self._text, self._role = opened(indexed.TEXT, dtype), opened(indexed.ROLE, np.uint16)
            if renderer.vision:
                self._indices = opened(indexed.INDICES, np.int32)
                pictures = (indexed.IMAGE, np.uint8) if self.encoded else (indexed.PATCHES, np.uint16)
                self._pictures = opened(*pictures)
            self._rows = stack.enter_context(indexed.RowsWriter(folder))
            self._files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    @property
    def totals(self) -> Mapping[str, int]:
        """What the counts of the packs up to now sum up to."""
        return self._rows.totals

    def write(self, packs: Packs) -> None:
        """Append packs, and a row of counts for each."""
        for laid in packs:
            images = [0] * len(laid.starts)
            self._text.documents(laid.text, laid.sizes)
            if self.renderer.vision:
                for number, found in enumerate(laid.pictures):
                    self._pictures.document(*self._items(found))
                    images[number] = len(found)
                self._indices.documents(laid.indices, laid.sizes)
            self._role.documents(laid.role, laid.sizes)
            patches = laid.counts(laid.role == IMAGE) if self.renderer.vision else images
            learnt = laid.counts(trained(laid.text, laid.role, self.renderer.vision))
            self._rows.packs(laid.sizes.tolist(), patches, images, learnt)

    def _items(self, pictures: list[Picture]) -> list[NDArray[Any] | bytes]:
        """Each picture's file, or the patches of all of them as the bits of halves."""
        encoded = [picture.encoded for picture in pictures]
        if self.encoded:
            return list(encoded)
        empty = np.empty((0, 3 * self.grid["patch_size"] ** 2), np.float16)
        values = np.concatenate([empty, *(patches(one, **self.grid, halves=True) for one in encoded)])
        return [values.view("<u2")]
