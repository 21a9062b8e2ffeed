"""Which samples of several sets are equal or similar.

Memory grows with their number by some ten bytes each: keys are looked at in as many passes as fit.
Different pictures, of which similar ones are counted one by one, take 32 bytes each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.data.prints import PICTURES, ROW, Printed
from plait.data.said import PERMUTATIONS

AT_ONCE = 1 << 22
"""Keys of a pass."""
STRETCH = 1 << 12
"""Samples that are read at once."""
PAIRS = 1 << 14
"""Pairs that are compared at once."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""``SPREAD`` of :mod:`plait.data.said`, of 64 bits."""
BANDS = 16
"""Texts that agree in all numbers of one band are compared: nearly all that are as similar as SIMILAR."""
SIMILAR = 0.8
"""Share of their pieces that similar texts have in common."""
DIFFERENT = int(PERMUTATIONS * (1 - SIMILAR))
"""Numbers in which similar texts differ at most."""
BITS = 6
"""Bits of 64 in which similar pictures differ at most."""
NEXT = 4
"""Neighbours, by their hashes, that a picture is compared with."""
Rows = NDArray[np.int64]
U64 = np.uint64
Wanted = Callable[[Rows, Rows], "NDArray[np.bool_] | bool"]


@dataclass(frozen=True)
class Alike:
    """Samples of several sets as one, in order.

    Attributes:
        sets: rows of :data:`plait.data.prints.ROW`, in files or not.
    """

    sets: Sequence[Printed | NDArray[Any]]

    @cached_property
    def ends(self) -> Rows:
        """How many samples the sets up to each have."""
        return np.cumsum([len(one) for one in self.sets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.sets) else 0

    def stretches(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """All samples, some at a time, with the number of the first."""
        for one, end in zip(self.sets, self.ends.tolist(), strict=True):
            for start in range(0, len(one), STRETCH):
                yield end - len(one) + start, one[start : start + STRETCH]

    def take(self, rows: Rows) -> NDArray[Any]:
        """Some samples."""
        which = np.searchsorted(self.ends, rows, side="right")
        found = np.zeros(len(rows), ROW)
        for number in np.unique(which).tolist():
            one, own = self.sets[number], which == number
            found[own] = one[rows[own] - (self.ends[number] - len(one))]
        return found

    # Equal ones

    def equal(self, field: str) -> Iterator[tuple[Rows, Rows]]:
        """Samples of which an earlier one has the same in a field, each with the first such.

        Of a field of several numbers these are counted through, those of one sample after those of the other.
        """
        for places, first in self._repeated(lambda one: one[field], prod(ROW[field].shape)):
            later = np.flatnonzero(first != np.arange(len(first)))
            yield places[first[later]], places[later]

    def _repeated(self, key_of: Any, width: int = 1) -> Iterator[tuple[Rows, Rows]]:
        """Places with keys that others have too and that are not 0, in the order of keys and places.

        Beside them, which of those that are given with it is the first that has its key.

        Args:
            key_of: gives the keys of samples.
            width: keys of a sample.
        """
        passes = -(-max(len(self) * width, 1) // AT_ONCE)
        for number in range(passes):
            yield _several(*self._keyed(key_of, width, passes, number))

    def _keyed(self, key_of: Any, width: int, passes: int, number: int) -> tuple[NDArray[Any], Rows]:
        """The keys of a pass, and their places."""
        keys, places = [np.zeros(0, U64)], [np.zeros(0, np.int64)]
        for start, some in self.stretches():
            found = np.asarray(key_of(some)).ravel()
            own = np.flatnonzero((found != 0) & (found % U64(passes) == number))
            keys.append(found[own])
            places.append(own + start * width)
        return np.concatenate(keys), np.concatenate(places)

    # Similar ones

    def similar(self, wanted: Wanted = lambda *_: True) -> Iterator[tuple[Rows, Rows]]:
        """Samples with similar texts, or none, and similar pictures: an earlier and a later one.

        A pair may come several times.
        """
        for earlier, later, alike in self.similar_texts(wanted):
            yield earlier[alike], later[alike]

    def similar_texts(
        self, wanted: Wanted = lambda *_: True
    ) -> Iterator[tuple[Rows, Rows, NDArray[np.bool_]]]:
        """Samples with similar texts, and whether their pictures are as many, and similar.

        Args:
            wanted: says of which pairs that is to be found out.
        """
        width = PERMUTATIONS // BANDS
        for band in range(BANDS):
            place = slice(band * width, (band + 1) * width)
            for rows, first in self._repeated(lambda one, place=place: _mixed(one, place)):
                later = np.flatnonzero(first != np.arange(len(first)))
                for start in range(0, len(later), PAIRS):
                    some = later[start : start + PAIRS]
                    third = some[first[some] != some - 1]
                    one, other = np.concatenate([first[some], third - 1]), np.concatenate([some, third])
                    yield self._checked(rows[one], rows[other], wanted)

    @cached_property
    def _sketches(self) -> NDArray[Any]:
        """A bit of each number of a text: similar ones differ in few."""
        found = [np.packbits(some["pieces"] & 1 != 0, axis=1) for _, some in self.stretches()]
        return np.concatenate([np.zeros((0, 8), np.uint8), *found]).view(U64).ravel()

    def _checked(self, earlier: Rows, later: Rows, wanted: Wanted) -> tuple[Rows, Rows, NDArray[np.bool_]]:
        near = np.bitwise_count(self._sketches[earlier] ^ self._sketches[later]) <= DIFFERENT
        near &= wanted(earlier, later)
        earlier, later = earlier[near], later[near]
        numbers, at = np.unique(np.concatenate([earlier, later]), return_inverse=True)
        told, (one, other) = self.take(numbers), at.reshape(2, -1)
        same = (told["pieces"][one] == told["pieces"][other]).mean(axis=1) >= SIMILAR
        bits = np.bitwise_count(told["look"][one] ^ told["look"][other])
        alike = (told["count"][one] == told["count"][other]) & (bits <= BITS).all(axis=1)
        return earlier[same], later[same], alike[same]


def picture_repeats(sets: Sequence[Printed | NDArray[Any]]) -> tuple[int, int]:
    """How many pictures are there before, byte for byte, and how many more look like another."""
    several, looks = Alike(sets), [np.zeros(0, U64)]
    again = later(several.equal("picture"), len(several) * PICTURES)
    for start, rows in several.stretches():
        before = again[start * PICTURES : (start + len(rows)) * PICTURES].reshape(-1, PICTURES)
        looks.append(rows["look"][(rows["picture"] != 0) & ~before])
    different = np.concatenate(looks)
    alike = np.zeros(len(different), bool)
    for turn in range(0, 64, 16):
        turned = (different << U64(turn)) | (different >> U64((64 - turn) % 64)) if turn else different
        order = np.argsort(turned, kind="stable")
        for start in range(0, len(order), STRETCH):
            some = order[start : start + STRETCH + NEXT]
            for step in range(1, NEXT + 1):
                one, other = some[:-step], some[step:]
                near = (np.bitwise_count(different[one] ^ different[other]) <= BITS) & (different[one] != 0)
                alike[np.maximum(one, other)[near]] = True
    return int(again.sum()), int(alike.sum())


def _several(keys: NDArray[Any], places: Rows) -> tuple[Rows, Rows]:
    """The places of keys that come several times, in the order of both, and for each the first of its key."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    again = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
    several = np.flatnonzero(again[1:] | again[:-1])
    starts = np.where(again[several], 0, np.arange(len(several)))
    return places[order[several]], np.asarray(np.maximum.accumulate(starts))


def _mixed(one: NDArray[Any], place: slice) -> NDArray[Any]:
    """One key of a band's numbers; 0 where there is no text."""
    found = np.zeros(len(one), U64)
    for number in one["pieces"][:, place].T:
        found = (found ^ number) * MIX
        found ^= found >> U64(29)
    return np.where(one["text"] != 0, np.maximum(found, U64(1)), U64(0))


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
