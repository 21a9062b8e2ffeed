"""What an iteration cost, in figures: operations, share of the peak, memory, time waited for data."""

import math
import resource
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch

from plait.models.specs import EMBEDDING, Spec

if TYPE_CHECKING:
    from plait.train.batches import Batch

GIGA, TERA = 1e9, 1e12
PROBE = 1024
"""Side of the matrices whose product measures a device's peak."""


def flops_per_token(spec: Spec, sequence: int, *, freeze: Collection[str] = ()) -> float:
    """Operations of one token forward and backward: 6 a weight, and 12 L H S of attention.

    A weight takes 2 forward, 2 for the gradient of what it is multiplied with and 2 for its own. A frozen
    language model has none of its own; the others it has, for what is trained lies before it: projector or
    tower. Attention multiplies activations alone, so it costs the same.

    The rule is that of PaLM's appendix B (Chowdhery et al. 2022): the embedding's lookup is none, nothing
    that is computed again counts, and of a layer's experts those that a token is sent to. The share of tower
    and projector, which pictures and not tokens cost, is left out.

    Args:
        spec: the model.
        sequence: S, tokens of a sequence.
        freeze: parts of the model that are not trained.
    """
    text = spec.lm
    used = text.experts_per_token / text.num_experts if text.num_experts else 1.0
    weights = sum(
        math.prod(shape) * (used if ".experts." in name else 1.0)
        for name, shape in text.shapes.items()
        if name != EMBEDDING or text.tied  # the lookup is none; a tied model's is its output layer too
    )
    attention = 12 * text.num_layers * text.query_size * sequence
    return (4.0 if "language_model" in freeze else 6.0) * weights + attention


def measured_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a matrix product of this type here; MFU is a share of it."""
    one = torch.ones(PROBE, PROBE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        one @ one
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * PROBE**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory() -> float:
    """The most memory that this process has held, in GB: of its GPU, or of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIGA
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGA


class Timed:
    """An iterator that adds up the seconds it is waited for."""

    def __init__(self, batches: "Iterator[Batch]") -> None:
        """Wrap micro-batches."""
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> "Iterator[Any]":
        """Itself."""
        return self

    def __next__(self) -> "Batch":
        """The next micro-batch."""
        began = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - began
