"""What a row of a parameter table does to its tensors.

An operation has two pairs of verbs. ``fuse`` and ``split`` change the format: Hugging Face's
tensors to Megatron's one, and back. ``cut`` and ``join`` change the grid: Megatron's whole tensor to
the part of one tensor rank, and back. Each pair is the other's inverse; coverage runs them on
element numbers to prove it.

In shapes: V = vocabulary, O = output features, D = input features, F = feed-forward size,
G = query groups, R = query heads a group, H = head size, T = tensor ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import CheckpointError, ConfigError
from plait.models.specs import Spec
from plait.models.towers import Tower
from plait.tokens.vocabulary import padded_vocab_size

Shape = Spec | Tower
"""The model, or the part of it, whose sizes an operation reads."""


@dataclass(frozen=True)
class Op:
    """One tensor that every tensor rank holds whole, such as a norm."""

    replicated = True

    def fuse(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:  # noqa: ARG002
        """Megatron's tensor from Hugging Face's, in the order of the row's names."""
        (whole,) = parts
        return whole

    def split(self, whole: Tensor, spec: Shape) -> list[Tensor]:  # noqa: ARG002
        """Hugging Face's tensors, in the order of the row's names."""
        return [whole]

    def cut(self, whole: Tensor, spec: Shape, *, tp: int, rank: int) -> Tensor:  # noqa: ARG002
        """The part of tensor rank ``rank`` of ``tp``."""
        return whole

    def join(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:  # noqa: ARG002
        """The whole tensor from the parts of all tensor ranks, in order.

        Raises:
            CheckpointError: ranks that should hold the same tensor do not.
        """
        first, *others = parts
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError("tensor ranks hold different copies of a replicated tensor")
        return first


@dataclass(frozen=True)
class Lifted(Op):
    """A vector (W,) that Megatron holds as (1, 1, W): the class token of CLIP."""

    def fuse(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:  # noqa: ARG002
        """With two axes of length 1 before it."""
        (vector,) = parts
        return vector[None, None]

    def split(self, whole: Tensor, spec: Shape) -> list[Tensor]:  # noqa: ARG002
        """Without them."""
        return [whole[0, 0]]


@dataclass(frozen=True)
class Column(Op):
    """A weight (O, D), or a bias (O,), whose output features are dealt out: rank r holds O/T rows."""

    replicated = False
    dim = 0

    def cut(self, whole: Tensor, spec: Shape, *, tp: int, rank: int) -> Tensor:  # noqa: ARG002
        """The ``rank``-th of ``tp`` equal pieces."""
        size = _share(whole.shape[self.dim], tp, "features")
        return whole.narrow(self.dim, rank * size, size)

    def join(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:  # noqa: ARG002
        """The pieces one after the other."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), self.dim)


@dataclass(frozen=True)
class RowWise(Column):
    """A weight (O, D) whose input features are dealt out: rank r holds D/T columns."""

    dim = 1


@dataclass(frozen=True)
class Vocab(Column):
    """A weight (V, D) cut by rows after rows of zeros were added, to a multiple of 128 x T."""

    def cut(self, whole: Tensor, spec: Shape, *, tp: int, rank: int) -> Tensor:  # noqa: ARG002
        """Rows of this rank; the last ranks also hold the padding."""
        size = padded_vocab_size(len(whole), tp) // tp
        rows = whole[rank * size : (rank + 1) * size]
        return (
            rows
            if len(rows) == size
            else torch.cat((rows, rows.new_zeros(size - len(rows), *rows.shape[1:])))
        )

    def join(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:
        """The true vocabulary; the padding is left out."""
        whole = super().join(parts, spec)
        assert isinstance(spec, Spec)
        if len(whole) < spec.vocab_size:
            raise CheckpointError(f"an embedding has {len(whole)} rows, its config says {spec.vocab_size}")
        return whole[: spec.vocab_size]


@dataclass(frozen=True)
class FuseQKV(Column):
    """Interleave q, k and v by query group, so that a cut by rows keeps each group whole.

    q (G*R*H, D), k and v (G*H, D)  <->  qkv (G*(R+2)*H, D). Rows of a group: its R query heads, then
    its key head, then its value head. Biases likewise, without D.
    """

    def fuse(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:
        """Group by group: queries, key, value."""
        groups = spec.num_key_value_heads
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, whole: Tensor, spec: Shape) -> list[Tensor]:
        """Queries, keys and values of all groups."""
        grouped = whole.unflatten(0, (spec.num_key_value_heads, -1))
        queries = grouped.shape[1] - 2 * spec.head_dim
        parts = grouped.split([queries, spec.head_dim, spec.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]

    def cut(self, whole: Tensor, spec: Shape, *, tp: int, rank: int) -> Tensor:
        """G/T whole groups."""
        _share(spec.num_key_value_heads, tp, "query groups")
        return super().cut(whole, spec, tp=tp, rank=rank)


@dataclass(frozen=True)
class FuseGateUp(Column):
    """Stack gate and up; a rank's part is [gate of the rank; up of the rank].

    gate and up (F, D)  <->  (2*F, D), cut into (2*F/T, D).
    """

    def fuse(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:  # noqa: ARG002
        """Gate over up."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor, spec: Shape) -> list[Tensor]:  # noqa: ARG002
        """The two halves."""
        return list(whole.chunk(2))

    def cut(self, whole: Tensor, spec: Shape, *, tp: int, rank: int) -> Tensor:
        """This rank's rows of each half."""
        halves = self.split(whole, spec)
        return torch.cat([super(FuseGateUp, self).cut(half, spec, tp=tp, rank=rank) for half in halves])

    def join(self, parts: Sequence[Tensor], spec: Shape) -> Tensor:
        """All gates, then all ups."""
        halves = zip(*(self.split(part, spec) for part in parts), strict=True)
        return torch.cat([torch.cat(half) for half in halves])


WHOLE = Op()
COLUMN = Column()
ROW = RowWise()
VOCAB = Vocab()


def _share(size: int, tp: int, what: str) -> int:
    if size % tp:
        legal = [n for n in range(1, size + 1) if size % n == 0]
        some = ", ".join(map(str, legal[:8]))
        raise ConfigError(f"{size} {what} do not divide among {tp} tensor ranks", hint=f"tp may be {some}")
    return size // tp
