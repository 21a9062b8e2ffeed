"""Which sequences an iteration sees, and the tensors of a micro-batch.

The order is a pure function of seed and step, the same for every grid: nothing of it is saved. At
draw ``k`` the source that lags most behind its weight gives its next pack (Megatron Core's own
blending helper), and a source's packs are permuted anew for each of its epochs.

B = sequences of a micro-batch, S = tokens of a sequence, N = patches, P = values of a patch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.data import images
from plait.parallel.grid import context_rows
from plait.tokens import roles
from plait.tokens.indexed import Pack, PackedShard

PER_TOKEN = ("input_ids", "labels", "loss_mask", "position_ids", "picture_rows")
PADDING = -1  # stands where a sequence has no token: a role no token has


@dataclass(frozen=True)
class Order:
    """The sequence of (source, pack) pairs of a run.

    Attributes:
        weights: sampling weight of each source.
        sizes: packs of each source.
        seed: seed of the permutations.
        draws: how many pairs there are.
    """

    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    seed: int
    draws: int

    def __post_init__(self) -> None:
        """Blend once; 12 bytes a draw."""
        from megatron.core.datasets import helpers

        sources = np.zeros(self.draws, dtype=np.int16)
        nth = np.zeros(self.draws, dtype=np.int64)
        weights = np.asarray(self.weights, dtype=np.float64)
        helpers.build_blending_indices(sources, nth, weights / weights.sum(), len(weights), self.draws, False)
        object.__setattr__(self, "_sources", sources)
        object.__setattr__(self, "_nth", nth)

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Source and pack of a draw."""
        source, nth = int(self._sources[draw]), int(self._nth[draw])  # type: ignore[attr-defined]
        epoch, place = divmod(nth, self.sizes[source])
        return source, int(_permutation(self.seed, source, epoch, self.sizes[source])[place])


@lru_cache(maxsize=256)
def _permutation(seed: int, source: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, source, epoch)).permutation(size)


@dataclass(frozen=True)
class Batch:
    """A micro-batch; what its tensors hold is said in :meth:`PackedGPTModel.forward`."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    pictures: Tensor | None = None
    picture_rows: Tensor | None = None
    sees_pictures: Tensor = field(default_factory=lambda: torch.zeros(1))
    """[B] or [1]: 1 where a sequence has a picture."""
    clipped: int = 0
    """Samples that lost their end: they were longer than a sequence (energon)."""
    samples: tuple[Any, ...] = ()
    """Of each sequence, source and pack; or the path of energon's sample."""

    def part(self, rank: int, ranks: int) -> "Batch":
        """The tokens that a context parallel rank has; the mask keeps its columns, pictures stay whole."""
        if ranks == 1:
            return self
        rows = context_rows(self.input_ids.shape[1], rank, ranks)
        own = {key: value[:, rows] for key in PER_TOKEN if (value := getattr(self, key)) is not None}
        clipped = self.clipped if rank == 0 else 0
        assert self.attention_mask is not None
        return replace(self, **own, attention_mask=self.attention_mask[:, :, rows], clipped=clipped)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return Batch(**moved)


@dataclass(frozen=True)
class Collator:
    """What turns packs into a micro-batch.

    Attributes:
        seq_length: S; packs are padded to it.
        pad_id: id under the padding; it is attended by padding only and never trained.
        loss_roles: role codes whose tokens are trained.
        no_loss_ids: ids that are never trained, whoever speaks them: vision tokens.
        patch_size: side of a patch in pixels.
        max_resolution: longest side of a picture in pixels.
        vision: whether the model has a patch projection.
        window: the model's sliding window, in tokens.
        by_documents: attention is told where documents begin: there is no mask.
    """

    seq_length: int
    pad_id: int
    loss_roles: tuple[int, ...]
    no_loss_ids: tuple[int, ...]
    patch_size: int
    max_resolution: int
    vision: bool
    window: int | None = None
    by_documents: bool = False

    def __call__(self, packs: Sequence[Pack]) -> Batch:
        """Pad and stack: each document sees itself only and starts at position 0."""
        text_BS = padded([pack.text for pack in packs], self.pad_id, self.seq_length)
        role_BS = padded([pack.role for pack in packs], PADDING, self.seq_length)
        document_BS = np.cumsum(role_BS == roles.PACK_SEP, axis=1)
        document_BS[role_BS == PADDING] = -1
        trained_BS = np.isin(role_BS, self.loss_roles) & ~np.isin(text_BS, self.no_loss_ids)
        patches, indices = self._patches(packs) if self.vision else (None, None)
        return Batch(
            input_ids=torch.from_numpy(text_BS),
            labels=torch.from_numpy(shifted(text_BS, self.pad_id)),
            loss_mask=torch.from_numpy(shifted(trained_BS, 0)).float(),
            position_ids=torch.from_numpy(positions(document_BS)),
            attention_mask=None
            if self.by_documents
            else masked_out(torch.from_numpy(document_BS), self.window),
            pictures=patches,
            picture_rows=indices,
            sees_pictures=torch.zeros(1) if indices is None else (indices >= 0).any(dim=1).float(),
        )

    def _patches(self, packs: Sequence[Pack]) -> tuple[Tensor, Tensor]:
        """Patches [N, P] of all packs and indices [B, S] into them; -1 stays -1."""
        indices_BS = padded([pack.patch_indices for pack in packs], -1, self.seq_length)
        found: list[NDArray[np.float32]] = []
        first = 0
        for row, pack in zip(indices_BS, packs, strict=True):
            of_pack = self._patches_of(pack)
            row[row >= 0] += first
            first += len(of_pack)
            found.append(of_pack)
        return torch.from_numpy(np.concatenate(found)), torch.from_numpy(indices_BS)

    def _patches_of(self, pack: Pack) -> NDArray[np.float32]:
        if pack.patches is not None:
            return pack.patches.astype(np.float32)
        size, longest = self.patch_size, self.max_resolution
        decoded = [images.patches(p, patch_size=size, max_resolution=longest) for p in pack.pictures]
        return np.concatenate([*decoded, np.zeros((0, 3 * size * size), dtype=np.float32)])


def padded(rows: Sequence[NDArray[Any]], fill: int, length: int) -> NDArray[np.int64]:
    """Rows of at most ``length`` values as one array [B, length], ``fill`` after their ends."""
    found = np.full((len(rows), length), fill, dtype=np.int64)
    for target, row in zip(found, rows, strict=True):
        target[: len(row)] = row
    return found


def shifted(values_BS: NDArray[Any], fill: int) -> NDArray[Any]:
    """Each token's successor; ``fill`` after the last."""
    following = np.full_like(values_BS, fill)
    following[:, :-1] = values_BS[:, 1:]
    return following


def positions(document_BS: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token in its document, from 0.

    >>> positions(np.array([[0, 0, 1, 1, 1, -1]]))
    array([[0, 1, 0, 1, 2, 0]])
    """
    places = np.broadcast_to(np.arange(document_BS.shape[1]), document_BS.shape)
    starts = np.zeros_like(document_BS)
    starts[:, 1:] = np.where(document_BS[:, 1:] != document_BS[:, :-1], places[:, 1:], 0)
    return places - np.maximum.accumulate(starts, axis=1)


def masked_out(document_BS: Tensor, window: int | None = None) -> Tensor:
    """Where attention is masked out [B, 1, S, S]: later tokens, other documents, tokens out of reach.

    Args:
        document_BS: the document of each token.
        window: tokens that a token of Mistral v0.1 sees, itself among them; None is all before it.
    """
    same = document_BS[:, :, None] == document_BS[:, None, :]
    seen = torch.ones(same.shape[-2:], dtype=torch.bool).tril()
    if window is not None:
        seen &= ~seen.tril(-window)
    return ~(same & seen)[:, None]


@dataclass(frozen=True)
class Feed:
    """Micro-batches of one data parallel rank.

    Attributes:
        shards: the sources, in the order of ``order``.
        order: which pack is drawn when.
        collate: what makes a micro-batch.
        micro: sequences of a micro-batch.
        total: sequences of an iteration, all ranks together.
        dp_rank: this rank.
        dp_size: number of data parallel ranks.
    """

    shards: Sequence[PackedShard]
    order: Order
    collate: Collator
    micro: int
    total: int
    dp_rank: int
    dp_size: int

    @property
    def seq_length(self) -> int:
        """Tokens of a sequence."""
        return self.collate.seq_length

    def state(self) -> None:
        """Nothing needs to be saved: the order is a function of seed and step."""

    def resume(self, start: Path) -> None:
        """Nothing needs to be read either."""

    def leave_out(self, iteration: int) -> list[Any]:
        """Nothing needs to be consumed: the next iteration's samples follow from its number. Its samples."""
        return [sample for drawn in self._drawn(iteration) for sample in drawn]

    def batches(self, iteration: int) -> Iterator[Batch]:
        """The micro-batches of the iteration after ``iteration`` finished ones."""
        for drawn in self._drawn(iteration):
            batch = self.collate([self.shards[source].pack(pack) for source, pack in drawn])
            yield replace(batch, samples=drawn)

    def _drawn(self, iteration: int) -> Iterator[tuple[tuple[int, int], ...]]:
        """Source and pack of each sequence of this rank's micro-batches."""
        stride = self.micro * self.dp_size
        for start in range(0, self.total, stride):
            first = iteration * self.total + start + self.dp_rank * self.micro
            yield tuple(self.order[draw] for draw in range(first, first + self.micro))
