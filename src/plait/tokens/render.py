"""Conversations to documents: token ids, roles and patch indices, by a template.

transformers is not needed: the tokenizer of a ``tokenizer.json`` is the one that AutoTokenizer uses.
No loop here runs over tokens: a text is cut at the tokens that its pieces begin with.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.data import chat, jpeg
from plait.data.images import Opened, patch_grid
from plait.errors import DataError
from plait.files import read_manifest
from plait.tokens import encode
from plait.tokens.documents import Batch, Picture
from plait.tokens.encode import Ids
from plait.tokens.made_by import digest
from plait.tokens.templates import TEMPLATES, Marks, Piece, Template
from plait.tokens.vocabulary import PICTURE, VISION_END, VISION_PATCH, VISION_ROW, VISION_START, picture_text

Grids = Mapping[int, tuple[int, int]]
"""Rows and columns of a picture's patches, by the number of its piece."""


class Renderer:
    """Turns conversations into documents as one format of the config says."""

    def __init__(self, folder: Path, form: Mapping[str, Any]) -> None:
        """Read a tokenizer.

        Args:
            folder: the tokenizer.
            form: ``template``, ``patch_size`` and ``max_resolution`` of a format of the config.

        Raises:
            DataError: the folder is no tokenizer, or has not what the template needs.
        """
        self.folder = folder
        self.facts: dict[str, Any] = read_manifest(folder, kind="tokenizer")["facts"]
        self.vision: dict[str, int] = self.facts["vision"]
        self.template = _template(folder, form["template"])
        self.grid_of = {"patch_size": form["patch_size"], "max_resolution": form["max_resolution"]}
        described = encode.read(folder)
        self._encoder = encode.Choice(folder, specials=self.template.whole, described=described)
        ids = encode.ids_by_name(described)
        self.vocabulary = digest(ids)
        bos, eos = (self.facts[key] for key in ("bos_id", "eos_id"))
        self.separator: int = eos if bos is None else bos
        if self.separator is None:
            raise DataError(f"{folder} has neither BOS nor EOS to put between documents")
        names = {token: name for name, token in ids.items() if token in (bos, eos)}
        self._marks = Marks(bos=names.get(bos, ""), eos=names.get(eos, ""))

    def pieces(self, sample: chat.Sample) -> list[Piece]:
        """The texts and pictures that a conversation is written as.

        Raises:
            RecordError: the template cannot write it; ``reason`` says why.
            DataError: it has pictures, and the template or the tokenizer has no place for them.
        """
        if sample.pictures:
            self._check_pictures(sample)
        return list(self.template.pieces(sample, self._marks))

    def documents(self, batch: Sequence[list[Piece]]) -> Batch:
        """Tokenise the pieces of many conversations at once."""
        grids = [self._grids(pieces) if self.vision else {} for pieces in batch]
        tokenised = self._whole if self.template.whole else self._apart
        return self._batch(*tokenised(batch, grids), batch, grids)

    def let_go(self) -> None:
        """Give the tokenizer's memory back, until another batch comes."""
        self._encoder.let_go()

    def _check_pictures(self, sample: chat.Sample) -> None:
        if not self.vision:
            raise DataError(
                f"sample {sample.id!r} has a picture and {self.folder} has no vision tokens",
                hint="extend the tokenizer by the group `vision` in config: tokenizers",
            )
        if self.template.pictures != PICTURE:
            raise DataError(
                f"sample {sample.id!r} has a picture, and this template cannot write one",
                hint="use the template pretrain or chatml in config: formats",
            )

    # Each piece by itself

    def _apart(self, batch: Sequence[list[Piece]], grids: Sequence[Grids]) -> tuple[list[Ids], list[int]]:
        texts = [p.content for pieces in batch for p in pieces if isinstance(p.content, str)]
        ids = self._encoder.apart(texts)
        if any(grids):
            found = iter(ids)
            ids = [
                next(found) if isinstance(piece.content, str) else self._picture_ids(*grid[number])
                for pieces, grid in zip(batch, grids, strict=True)
                for number, piece in enumerate(pieces)
            ]
        return ids, [len(one) for one in ids]

    def _picture_ids(self, rows: int, columns: int) -> NDArray[np.int32]:
        tokens = np.full((rows, columns + 1), self.vision[VISION_PATCH], np.int32)
        tokens[:, 0] = self.vision[VISION_ROW]
        tokens[0, 0] = self.vision[VISION_START]
        return np.append(tokens, np.int32(self.vision[VISION_END]))

    # The whole text at once

    def _whole(self, batch: Sequence[list[Piece]], grids: Sequence[Grids]) -> tuple[list[Ids], list[int]]:
        written = [
            [
                p.content if isinstance(p.content, str) else picture_text(*grid[n])
                for n, p in enumerate(pieces)
            ]
            for pieces, grid in zip(batch, grids, strict=True)
        ]
        found = self._encoder.whole(written)
        sizes = [end - start for _, starts in found for start, end in pairwise(starts)]
        return [ids for ids, _ in found], sizes

    # Both

    def _grids(self, pieces: list[Piece]) -> Grids:
        """Rows and columns of the patches of the pieces that are pictures."""
        return {
            number: patch_grid(*_sides(piece.content.encoded), **self.grid_of)
            for number, piece in enumerate(pieces)
            if isinstance(piece.content, chat.Picture)
        }

    def _batch(
        self, ids: list[Ids], sizes: list[int], batch: Sequence[list[Piece]], grids: Sequence[Grids]
    ) -> Batch:
        """Give every token its role, and every patch its index.

        Args:
            ids: token ids, which are N together.
            sizes: tokens of each piece of all documents.
            batch: the pieces of each.
            grids: rows and columns of its pieces that are pictures.
        """
        text = np.concatenate(ids)
        places = [0, *accumulate(sizes)]
        firsts = [0, *accumulate(map(len, batch))]
        indices = np.full(len(text), -1, np.int32) if any(grids) else None
        pictures = []
        for first, pieces, grid in zip(firsts, batch, grids, strict=False):
            own, before = [], 0
            for number, (rows, columns) in grid.items():
                start, end = places[first + number], places[first + number + 1]
                patches = start + np.flatnonzero(text[start:end] == self.vision[VISION_PATCH])
                assert indices is not None
                assert len(patches) == rows * columns
                indices[patches] = np.arange(before, before + len(patches))
                own.append(Picture(_encoded(pieces[number]), len(patches)))
                before += len(patches)
            pictures.append(own)
        return Batch(text, *_runs(batch, sizes, firsts), indices, pictures)


def _runs(
    batch: Sequence[list[Piece]], sizes: list[int], firsts: list[int]
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]:
    """Tokens and role of runs of pieces of one role, and the first run of each document, and their number."""
    codes = np.array([piece.role for pieces in batch for piece in pieces], np.uint8)
    begins = np.diff(codes, prepend=codes[:1]) != 0
    begins[[first for first in firsts if first < len(codes)]] = True
    runs = np.flatnonzero(begins)
    return np.add.reduceat(sizes, runs, dtype=np.int32), codes[runs], np.searchsorted(runs, firsts)


def _template(folder: Path, name: str) -> Template:
    if name in TEMPLATES:
        return TEMPLATES[name]
    from plait.tokens.jinja import own_template

    return own_template(folder)


def _sides(encoded: bytes) -> tuple[int, int]:
    """Width and height of a picture file, by its head; the chat stage has decoded it whole."""
    return Opened.of(encoded, jpeg.head(encoded)).size


def _encoded(piece: Piece) -> bytes:
    assert isinstance(piece.content, chat.Picture)
    return piece.content.encoded
