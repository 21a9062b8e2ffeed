"""Conversations to documents: token ids, roles and patch indices, by a template.

transformers is not needed: the tokenizer of a ``tokenizer.json`` is the one that AutoTokenizer uses.
No loop here runs over tokens: a text is cut at the tokens that its pieces begin with.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.data import chat
from plait.data.images import patch_grid
from plait.errors import DataError
from plait.files import read_manifest
from plait.tokens import encode
from plait.tokens.documents import Document, Picture, no_patches
from plait.tokens.encode import Ids
from plait.tokens.made_by import digest
from plait.tokens.roles import IMAGE
from plait.tokens.templates import TEMPLATES, Marks, Piece, Template
from plait.tokens.vocabulary import PICTURE, VISION_END, VISION_PATCH, VISION_ROW, VISION_START, picture_text

Grid = tuple[int, int]


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
        self._encoder = encode.Choice(folder, specials=self.template.whole)
        ids = encode.ids_by_name(encode.read(folder))
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

    def documents(self, batch: Sequence[list[Piece]]) -> list[Document]:
        """Tokenise the pieces of many conversations at once."""
        return self._whole(batch) if self.template.whole else self._apart(batch)

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

    def _apart(self, batch: Sequence[list[Piece]]) -> list[Document]:
        texts = [p.content for pieces in batch for p in pieces if isinstance(p.content, str)]
        ids = iter(self._encoder.apart(texts))
        return [self._joined(pieces, ids) for pieces in batch]

    def _joined(self, pieces: list[Piece], texts: Iterator[Ids]) -> Document:
        grids = self._grids(pieces)
        ids = [
            next(texts) if isinstance(piece.content, str) else self._picture_ids(*grids[number])
            for number, piece in enumerate(pieces)
        ]
        starts = [0, *accumulate(map(len, ids))]
        return self._document(ids[0] if len(ids) == 1 else np.concatenate(ids), starts, pieces, grids)

    def _picture_ids(self, rows: int, columns: int) -> NDArray[np.int32]:
        tokens = np.full((rows, columns + 1), self.vision[VISION_PATCH], np.int32)
        tokens[:, 0] = self.vision[VISION_ROW]
        tokens[0, 0] = self.vision[VISION_START]
        return np.append(tokens, np.int32(self.vision[VISION_END]))

    # The whole text at once

    def _whole(self, batch: Sequence[list[Piece]]) -> list[Document]:
        grids = [self._grids(pieces) for pieces in batch]
        written = [
            [
                p.content if isinstance(p.content, str) else picture_text(*grid[n])
                for n, p in enumerate(pieces)
            ]
            for pieces, grid in zip(batch, grids, strict=True)
        ]
        return [
            self._document(*found, pieces, grid)
            for found, pieces, grid in zip(self._encoder.whole(written), batch, grids, strict=True)
        ]

    # Both

    def _grids(self, pieces: list[Piece]) -> dict[int, Grid]:
        """Rows and columns of the patches of the pieces that are pictures."""
        return {
            number: patch_grid(*_size(piece.content.encoded), **self.grid_of)
            for number, piece in enumerate(pieces)
            if isinstance(piece.content, chat.Picture)
        }

    def _document(
        self, text: NDArray[np.int32], starts: Sequence[int], pieces: list[Piece], grids: Mapping[int, Grid]
    ) -> Document:
        """Give every token its role, and every patch its index.

        Args:
            text: (n,) token ids.
            starts: first token of each piece, and n.
            pieces: what the tokens were made of.
            grids: rows and columns of the pieces that are pictures.
        """
        sizes = [end - start for start, end in pairwise(starts)]
        role = np.repeat(np.array([piece.role for piece in pieces], np.uint8), sizes)
        if not grids:
            return Document(text, role, no_patches(len(text)), [])
        indices = np.full(len(text), -1, np.int32)
        pictures, before = [], 0
        for number, (rows, columns) in grids.items():
            start, end = starts[number : number + 2]
            patches = start + np.flatnonzero(text[start:end] == self.vision[VISION_PATCH])
            assert len(patches) == rows * columns
            role[patches] = IMAGE
            indices[patches] = np.arange(before, before + len(patches))
            pictures.append(Picture(_encoded(pieces[number]), len(patches)))
            before += len(patches)
        return Document(text, role, indices, pictures)


def _template(folder: Path, name: str) -> Template:
    if name in TEMPLATES:
        return TEMPLATES[name]
    from plait.tokens.jinja import own_template

    return own_template(folder)


def _size(encoded: bytes) -> tuple[int, int]:
    """Width and height, from the head of a picture file; the chat stage has decoded it whole."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return image.size


def _encoded(piece: Piece) -> bytes:
    assert isinstance(piece.content, chat.Picture)
    return piece.content.encoded
