"""Sampling weights of a mixture: how often each indexed shard is drawn from.

Natural weights are shares of the packed sequences, so an epoch reads each once. Explicit weights
are given by dataset; inside one, each shard gets its share of the dataset's tokens. Solved weights are shares
of the packed sequences that the solver has an epoch read.

>>> shards = [Shard("a/shard_00000", "a", packs=30, tokens=900), Shard("b/shard_00000", "b", 10, 300)]
>>> classic(natural(shards))
'0.7500 a/shard_00000/data 0.2500 b/shard_00000/data'
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.errors import DataError

DIGITS = 4
"""Digits after the point in the classic string, unless a weight would become 0."""


@dataclass(frozen=True, slots=True)
class Shard:
    """An indexed shard: its folder, its dataset, its packed sequences, tokens and those of pictures."""

    prefix: str
    dataset: str
    packs: int
    tokens: int
    picture_tokens: int = 0


Weighed = list[tuple[Shard, float]]


def natural(shards: Sequence[Shard]) -> Weighed:
    """Weigh each shard by its share of the packed sequences."""
    total = sum(shard.packs for shard in shards)
    return [(shard, shard.packs / total) for shard in shards]


def explicit(shards: Sequence[Shard], weights: Mapping[str, float]) -> Weighed:
    """Weigh each dataset as told, and each shard in it by its share of the dataset's tokens.

    Raises:
        DataError: the shards are not those of the datasets that have weights.
    """
    check(shards, list(weights))
    tokens = {name: sum(s.tokens for s in shards if s.dataset == name) for name in weights}
    total = math.fsum(weights.values())
    return [(s, weights[s.dataset] / total * s.tokens / tokens[s.dataset]) for s in shards]


def read(shards: Sequence[Shard], reads: Sequence[float]) -> tuple[Weighed, int]:
    """Weigh each shard by the sequences of so many readings, and count these; unread ones are left out."""
    drawn = [(s, s.packs * number) for s, number in zip(shards, reads, strict=True) if number]
    total = math.fsum(packs for _, packs in drawn)
    return [(shard, packs / total) for shard, packs in drawn], round(total)


def check(shards: Sequence[Shard], datasets: Sequence[str]) -> None:
    """Compare the datasets that have shards with those that the mixture names.

    Raises:
        DataError: they differ.
    """
    found = {shard.dataset for shard in shards}
    if found != set(datasets):
        raise DataError(
            f"the shards are of the datasets {', '.join(sorted(found))}; "
            f"the mixture names {', '.join(sorted(datasets))}"
        )


def instances(weighed: Weighed) -> int:
    """Packed sequences in all: what an epoch draws."""
    return sum(shard.packs for shard, _ in weighed)


def rounded(weights: Sequence[float]) -> list[str]:
    """Weights as decimals that sum to exactly 1, none of which is 0.

    What rounding down leaves over goes to the weights that lost most by it.
    """
    digits = max(DIGITS, math.ceil(-math.log10(min(weights))))
    whole = 10**digits
    units = [max(math.floor(weight * whole), 1) for weight in weights]
    by_loss = sorted(range(len(units)), key=lambda n: units[n] - weights[n] * whole)
    for number in by_loss[: whole - sum(units)]:
        units[number] += 1
    return [f"{unit // whole}.{unit % whole:0{digits}d}" for unit in units]


def classic(weighed: Weighed, *, data: str = "/data") -> str:
    """The mixture as Megatron's ``--data-path`` takes it: ``weight prefix weight prefix ...``.

    Args:
        weighed: shards, or energon's datasets.
        data: what follows a folder in its prefix; nothing, for eyes only.
    """
    decimals = rounded([weight for _, weight in weighed])
    return " ".join(f"{d} {shard.prefix}{data}" for d, (shard, _) in zip(decimals, weighed, strict=True))


def to_json(weighed: Weighed, total: int | None = None) -> dict[str, Any]:
    """The content of mixture.yaml. ``epochs``: how often an epoch of the mixture reads the shard.

    Args:
        weighed: shards with their weights.
        total: packed sequences of an epoch; None: all that there are.
    """
    total = total or instances(weighed)
    return {
        "total_instances": total,
        "total_tokens": sum(shard.tokens for shard, _ in weighed),
        "sources": [
            {
                "prefix": shard.prefix,
                "dataset": shard.dataset,
                "weight": weight,
                "packs": shard.packs,
                "tokens": shard.tokens,
                "epochs": round(weight * total / shard.packs, 6),
            }
            for shard, weight in weighed
        ],
    }
