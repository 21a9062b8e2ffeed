"""What the layers of a model give, on disk: two computations of it are compared layer by layer.

B = sequences, S = tokens, D = hidden size, V = vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PRECISIONS = (torch.float32, torch.float64)
"""Weights are the artifact's, in fp32; sums are taken in fp32 and in fp64, on both sides."""
Logits = dict[torch.dtype, list[Tensor]]
"""By arithmetic, one [B, S, V] a case."""


@dataclass(frozen=True)
class Difference:
    """How far a layer's states are from the reference's, over all cases.

    Attributes:
        layer: its number.
        largest: the reference's largest state.
        by: the largest difference, by arithmetic.
    """

    layer: int
    largest: float
    by: dict[torch.dtype, float]


def worst(found: Sequence[Difference]) -> Difference:
    """The largest differences of one layer, of those that several processes found."""
    by = {dtype: reduce(_larger, (one.by[dtype] for one in found)) for dtype in PRECISIONS}
    return Difference(found[0].layer, max(one.largest for one in found), by)


def _larger(one: float, other: float) -> float:
    """The larger of two, and what is no number before any number."""
    return one if one > other or math.isnan(one) else other


@dataclass(frozen=True)
class States:
    """A folder of hidden states [B, S, D]: memory does not grow with the layers."""

    folder: Path

    def keep(self, states: Tensor, *, dtype: torch.dtype, case: int, layer: int) -> None:
        """Write down what a layer gave."""
        np.save(self._path(dtype, case, layer), states.numpy())

    def differences(self, layer: int, found: Mapping[tuple[torch.dtype, int], Tensor]) -> Difference:
        """Compare what a layer gives with what was kept.

        Args:
            layer: its number.
            found: [B, S, D], by arithmetic and number of the case.
        """
        by, largest = dict.fromkeys(PRECISIONS, 0.0), 0.0
        for (dtype, case), states in found.items():
            kept = torch.from_numpy(np.load(self._path(dtype, case, layer)))
            largest = max(largest, float(kept.abs().max()))
            by[dtype] = _larger(by[dtype], float((kept - states).abs().max()))
        return Difference(layer, largest, by)

    def _path(self, dtype: torch.dtype, case: int, layer: int) -> Path:
        return self.folder / f"{layer}-{case}-{str(dtype).removeprefix('torch.')}.npy"
