"""Counts of many sequences, kept as how often each number comes: little, however many they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tally:
    """Numbers whose order does not matter.

    Attributes:
        values: (V,) each of them once, ascending.
        counts: (V,) how often each comes.
    """

    values: Ints
    counts: Ints

    @classmethod
    def of(cls, numbers: NDArray[np.integer]) -> "Tally":
        """Of numbers one by one."""
        values, counts = np.unique(numbers, return_counts=True)
        return cls(values.astype(np.int64), counts)

    @classmethod
    def counted(cls, counts: Mapping[int, int]) -> "Tally":
        """Of how often each number comes."""
        return cls(*np.array(sorted(counts.items()), np.int64).reshape(-1, 2).T)

    @classmethod
    def together(cls, several: Iterable["Tally"]) -> "Tally":
        """Of all numbers of several."""
        each = [cls.of(np.zeros(0, np.int64)), *several]
        values, at = np.unique(np.concatenate([one.values for one in each]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, at, np.concatenate([one.counts for one in each]))
        return cls(values, counts)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Their sum."""
        return int(self.values @ self.counts)

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / len(self)

    @property
    def deviation(self) -> float:
        """The standard deviation of a sample; 0 of one number."""
        size = len(self)
        return float(np.sqrt((self.values - self.mean) ** 2 @ self.counts / (size - 1))) if size > 1 else 0.0

    def at(self, places: NDArray[np.integer]) -> Ints:
        """Those that stand at places, from 0, of all in their order."""
        return self.values[np.searchsorted(np.cumsum(self.counts), places, side="right")]

    def quantile(self, shares: Iterable[float]) -> NDArray[np.float64]:
        """What such shares of them do not exceed, interpolated between two of them."""
        places = np.array([*shares]) * (len(self) - 1)
        low, high = (self.at(place.astype(np.int64)) for place in (np.floor(places), np.ceil(places)))
        found: NDArray[np.float64] = low + (high - low) * (places - np.floor(places))
        return found
