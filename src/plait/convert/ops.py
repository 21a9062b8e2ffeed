"""Where the boxes of Hugging Face's tensors stand in Megatron's.

A row of a parameter table has an operation: it says once, as boxes, what a tensor rank holds of which
Hugging Face tensors. Everything else follows from that: fusing and splitting, cutting and joining, any grid
to any other, what is padding, and the proof that each element is written once.

Tensors are seen as matrices: rows are the first axis, columns all others together.

In shapes: V = vocabulary, O = output features, D = input features, F = feed-forward size,
G = query groups, R = query heads a group, H = head size, T = tensor ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plait.errors import ConfigError
from plait.models.specs import Spec
from plait.models.towers import Tower
from plait.tokens.vocabulary import padded_vocab_size

Shape = tuple[int, ...]
Sizes = Spec | Tower
"""The model, or the part of it, whose sizes an operation reads."""


class Piece(NamedTuple):
    """A box of a Hugging Face tensor, and where it stands in the tensor that holds it."""

    hf: str
    row: int
    col: int
    rows: int
    cols: int
    at_row: int
    at_col: int


@dataclass(frozen=True)
class Held:
    """A tensor made of boxes of others; what no box covers is padding, zeros.

    Attributes:
        shape: its shape.
        pieces: the boxes.
        view: rows and columns, where they are not those of the shape.
        copy: 0 where it holds its elements first, else which copy of them it is.
    """

    shape: Shape
    pieces: tuple[Piece, ...]
    view: tuple[int, int] | None = None
    copy: int = 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Its rows and columns."""
        return self.view or matrix(self.shape)

    @property
    def elements(self) -> int:
        """How many there are, padding too."""
        return math.prod(self.shape)

    @property
    def padding(self) -> int:
        """Elements that no box covers."""
        return self.elements - sum(piece.rows * piece.cols for piece in self.pieces)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A shape as rows and columns; a vector has one column.

    >>> matrix((8, 3, 2, 2)), matrix((5,)), matrix(())
    ((8, 12), (5, 1), (1, 1))
    """
    return (shape[0] if shape else 1), math.prod(shape[1:])


class Part(NamedTuple):
    """Which part of a tensor is asked for.

    Attributes:
        rank: the tensor rank.
        tp: T.
        divisor: the vocabulary is padded to a multiple of ``divisor`` x T; 1 leaves it as it is.
    """

    rank: int = 0
    tp: int = 1
    divisor: int = 1


@dataclass(frozen=True)
class Op:
    """One tensor that every tensor rank holds whole, such as a norm."""

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:  # noqa: ARG002
        """What a tensor rank holds.

        Args:
            names: Hugging Face's tensors, in the order of the table's row.
            shapes: their shapes.
            sizes: the model, or the part of it.
            part: the rank.

        Raises:
            ConfigError: the tensor does not divide among so many ranks; legal numbers are named.
        """
        ((name,), (shape,)) = names, shapes
        return Held(shape, (Piece(name, 0, 0, *matrix(shape), 0, 0),), copy=part.rank)


@dataclass(frozen=True)
class Lifted(Op):
    """A vector (W,) that Megatron holds as (1, 1, W): the class token of CLIP."""

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:
        """Whole, with two axes of length 1 before it."""
        flat = super().held(names, shapes, sizes, part)
        return Held((1, 1, *flat.shape), flat.pieces, view=flat.matrix, copy=part.rank)


@dataclass(frozen=True)
class Column(Op):
    """A weight (O, D), or a bias (O,), whose output features are dealt out: rank r holds O/T rows."""

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:  # noqa: ARG002
        """The rank's rows of each tensor, one tensor after the other."""
        pieces, at = [], 0
        for name, shape in zip(names, shapes, strict=True):
            rows, cols = matrix(shape)
            share = _share(rows, part.tp, "features")
            pieces.append(Piece(name, part.rank * share, 0, share, cols, at, 0))
            at += share
        return Held((at, *shapes[0][1:]), tuple(pieces))


@dataclass(frozen=True)
class FuseGateUp(Column):
    """Gate over up: gate and up (F, D) -> (2*F, D); a rank holds [gate of the rank; up of the rank]."""


@dataclass(frozen=True)
class RowWise(Op):
    """A weight (O, D) whose input features are dealt out: rank r holds D/T columns."""

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:  # noqa: ARG002
        """The rank's columns."""
        ((name,), (shape,)) = names, shapes
        rows, cols = shape
        share = _share(cols, part.tp, "features")
        piece = Piece(name, 0, part.rank * share, rows, share, 0, 0)
        return Held((rows, share), (piece,))


@dataclass(frozen=True)
class Vocab(Op):
    """A weight (V, D) cut by rows after rows of zeros were added; the last ranks hold the padding."""

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:  # noqa: ARG002
        """The rank's rows of the true vocabulary; those after it are padding."""
        ((name,), (shape,)) = names, shapes
        vocabulary, cols = matrix(shape)
        share = padded_vocab_size(vocabulary, part.tp, part.divisor) // part.tp
        first = min(part.rank * share, vocabulary)
        rows = min(share, vocabulary - first)
        return Held((share, *shape[1:]), (Piece(name, first, 0, rows, cols, 0, 0),))


@dataclass(frozen=True)
class FuseQKV(Op):
    """q, k and v interleaved by query group, so that a cut by rows keeps each group whole.

    q (G*R*H, D), k and v (G*H, D) -> qkv (G*(R+2)*H, D). Rows of a group: its R query heads, then
    its key head, then its value head. Biases likewise, without D.
    """

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:
        """G/T whole groups: queries, key, value of each."""
        return _in_turn(names, shapes, sizes.num_key_value_heads, part, "query groups")


@dataclass(frozen=True)
class PairedQKV(FuseQKV):
    """The same with the rows of each query and key head in pairs: 0, H/2, 1, H/2 + 1 and so on.

    So Megatron-LLM has them, whose rotary embedding turns neighbours where Hugging Face's turns halves.
    """

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:
        """A box for each row of queries and keys."""
        straight = super().held(names, shapes, sizes, part)
        half = sizes.head_dim // 2
        pieces: list[Piece] = []
        for piece in straight.pieces:
            if piece.hf == names[2]:
                pieces.append(piece)
                continue
            for row in range(piece.rows):
                head, within = divmod(row, 2 * half)
                there = 2 * (head * half + within % half) + within // half
                pieces.append(piece._replace(row=piece.row + row, rows=1, at_row=piece.at_row + there))
        return Held(straight.shape, tuple(pieces))


@dataclass(frozen=True)
class QKVByHeads(Op):
    """q, k and v interleaved by query head, k and v in pieces that are no heads where groups are fewer.

    So LLaVA-JP wrote them. With as many groups as heads it is :class:`FuseQKV`; with fewer, the network that
    was trained is not the one that was meant.
    """

    def held(self, names: Sequence[str], shapes: Sequence[Shape], sizes: Sizes, part: Part) -> Held:
        """Head by head: its rows of queries, an equal share of the keys' and of the values'."""
        return _in_turn(names, shapes, sizes.num_attention_heads, part, "attention heads")


WHOLE = Op()
COLUMN = Column()
ROW = RowWise()
VOCAB = Vocab()


def _in_turn(names: Sequence[str], shapes: Sequence[Shape], count: int, part: Part, what: str) -> Held:
    """The rank's share of ``count`` slices of each tensor: the first of all, the second of all, and so on."""
    share = _share(count, part.tp, what)
    pieces, at = [], 0
    for number in range(part.rank * share, (part.rank + 1) * share):
        for name, shape in zip(names, shapes, strict=True):
            rows, cols = matrix(shape)
            rows //= count
            pieces.append(Piece(name, number * rows, 0, rows, cols, at, 0))
            at += rows
    return Held((at, *shapes[0][1:]), tuple(pieces))


def _share(size: int, tp: int, what: str) -> int:
    if size % tp:
        legal = [n for n in range(1, size + 1) if size % n == 0]
        some = ", ".join(map(str, legal[:8]))
        raise ConfigError(f"{size} {what} do not divide among {tp} tensor ranks", hint=f"tp may be {some}")
    return size // tp
