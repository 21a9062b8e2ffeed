"""Which samples of several sets are equal or similar.

Memory grows with their number by a byte each only: keys are looked at in as many passes as fit.
Pictures that look alike, counted one by one, take 16 bytes each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.data.said import PERMUTATIONS

AT_ONCE = 1 << 22
"""Keys of a pass."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""``SPREAD`` of :mod:`plait.data.said`, of 64 bits."""
BANDS = 16
"""Texts that agree in all numbers of one band are compared: nearly all that are as similar as SIMILAR."""
SIMILAR = 0.8
"""Share of their pieces that similar texts have in common."""
BITS = 6
"""Bits of 64 in which similar pictures differ at most."""
NEXT = 4
"""Neighbours, by their hashes, that a picture is compared with."""
Rows = NDArray[np.int64]
U64 = np.uint64


@dataclass(frozen=True)
class Alike:
    """Samples of several sets as one, in order.

    Attributes:
        sets: rows of :data:`plait.data.prints.ROW`, mapped or not.
    """

    sets: Sequence[NDArray[Any]]

    @cached_property
    def ends(self) -> Rows:
        """How many samples the sets up to each have."""
        return np.cumsum([len(one) for one in self.sets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.sets) else 0

    def take(self, rows: Rows, field: str) -> NDArray[Any]:
        """A field of some samples."""
        which = np.searchsorted(self.ends, rows, side="right")
        shape = (len(rows), *self.sets[0][field].shape[1:])
        found = np.zeros(shape, self.sets[0][field].dtype)
        for number, one in enumerate(self.sets):
            own = which == number
            found[own] = one[field][rows[own] - (self.ends[number] - len(one))]
        return found

    # Equal ones

    def equal(self, field: str) -> Iterator[tuple[Rows, Rows]]:
        """Samples of which an earlier one has the same in a field, each with the first such."""
        for keys, rows in self._sorted(lambda one: one[field]):
            first = _firsts(keys)
            later = first != np.arange(len(keys))
            yield rows[first[later]], rows[later]

    def _sorted(self, key_of: Any) -> Iterator[tuple[NDArray[Any], Rows]]:
        """Keys that are not 0, with their samples, in the order of both; equal ones are in one pass."""
        passes = -(-max(len(self), 1) // AT_ONCE)
        for number in range(passes):
            keys, rows = [np.zeros(0, U64)], [np.zeros(0, np.int64)]
            for one, end in zip(self.sets, self.ends, strict=True):
                for start in range(0, len(one), AT_ONCE):
                    found = np.asarray(key_of(one[start : start + AT_ONCE]))
                    own = np.flatnonzero((found != 0) & (found % U64(passes) == number))
                    keys.append(found[own])
                    rows.append(own + (end - len(one) + start))
            key, row = np.concatenate(keys), np.concatenate(rows)
            order = np.lexsort((row, key))
            yield key[order], row[order]

    # Similar ones

    def similar(self) -> Iterator[tuple[Rows, Rows]]:
        """Samples with similar texts, or none, and similar pictures: an earlier and a later one.

        A pair may come several times.
        """
        for earlier, later in self.similar_texts():
            alike = self.same_pictures(earlier, later)
            yield earlier[alike], later[alike]

    def similar_texts(self) -> Iterator[tuple[Rows, Rows]]:
        """Samples with similar texts."""
        width = PERMUTATIONS // BANDS
        for band in range(BANDS):
            place = slice(band * width, (band + 1) * width)
            for keys, rows in self._sorted(lambda one, place=place: _mixed(one, place)):
                first = _firsts(keys)
                numbers = np.arange(len(keys))
                later = np.flatnonzero(first != numbers)
                for others in (first[later], later - 1):
                    for start in range(0, len(later), AT_ONCE // PERMUTATIONS):
                        part = slice(start, start + AT_ONCE // PERMUTATIONS)
                        yield self._checked(rows[others[part]], rows[later[part]])

    def _checked(self, earlier: Rows, later: Rows) -> tuple[Rows, Rows]:
        same = (self.take(earlier, "pieces") == self.take(later, "pieces")).mean(axis=1)
        return earlier[same >= SIMILAR], later[same >= SIMILAR]

    def same_pictures(self, earlier: Rows, later: Rows) -> NDArray[np.bool_]:
        """Whether the pictures of each pair are as many, and similar."""
        counts = self.take(earlier, "count") == self.take(later, "count")
        bits = np.bitwise_count(self.take(earlier, "look") ^ self.take(later, "look"))
        return np.asarray(counts & (bits <= BITS).all(axis=1))


def picture_repeats(sets: Sequence[NDArray[Any]]) -> tuple[int, int]:
    """How many pictures are there before, byte for byte, and how many more look like another."""
    files = np.concatenate([np.zeros(0, U64), *(one["picture"].ravel() for one in sets)])
    looks = np.concatenate([np.zeros(0, U64), *(one["look"].ravel() for one in sets)])
    there = files != 0
    _, places = np.unique(files[there], return_index=True)
    different = looks[there][np.sort(places)]
    alike = np.zeros(len(different), bool)
    for turn in range(0, 64, 16):
        turned = (different << U64(turn)) | (different >> U64((64 - turn) % 64)) if turn else different
        order = np.argsort(turned, kind="stable")
        for step in range(1, NEXT + 1):
            one, other = order[:-step], order[step:]
            near = (np.bitwise_count(different[one] ^ different[other]) <= BITS) & (different[one] != 0)
            alike[np.maximum(one, other)[near]] = True
    return int(there.sum() - len(different)), int(alike.sum())


def _mixed(one: NDArray[Any], place: slice) -> NDArray[Any]:
    """One key of a band's numbers; 0 where there is no text."""
    found = np.zeros(len(one), U64)
    for number in one["pieces"][:, place].T:
        found = (found ^ number) * MIX
        found ^= found >> U64(29)
    return np.where(one["text"] != 0, np.maximum(found, U64(1)), U64(0))


def _firsts(keys: NDArray[Any]) -> Rows:
    """For each of sorted keys, the place of the first one that is equal."""
    starts = np.ones(len(keys), bool)
    starts[1:] = keys[1:] != keys[:-1]
    return np.asarray(np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0)))


def later(pairs: Iterator[tuple[Rows, Rows]], size: int) -> NDArray[np.bool_]:
    """Which of so many samples are the later ones of pairs.

    Args:
        pairs: earlier and later samples.
        size: how many samples there are.
    """
    found = np.zeros(size, bool)
    for _, other in pairs:
        found[other] = True
    return found
