"""Which samples of several sets are equal or similar.

Memory holds a part of their keys at a time, of parts that are temporary files, and five bytes of each sample:
whether it was there before.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait import files
from plait.data.prints import PICTURES, ROW, Printed
from plait.data.said import PERMUTATIONS

AT_ONCE, PARTS = 1 << 18, 512
"""Keys of a part, about, and parts at most: each is a file that is open."""
STRETCH = 1 << 12
"""Samples that are read at once."""
PAIRS = 1 << 14
"""Pairs that are compared at once."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""``SPREAD`` of :mod:`plait.data.said`, of 64 bits."""
BANDS, BESIDE = 16, 4
"""Texts that agree in all numbers of a band are compared: nearly all that are as similar as SIMILAR. So many
bands are looked at in one reading."""
SIMILAR = 0.8
"""Share of their pieces that similar texts have in common."""
DIFFERENT = int(PERMUTATIONS * (1 - SIMILAR))
"""Numbers in which similar texts differ at most."""
BITS = 6
"""Bits of 64 in which similar pictures differ at most."""
NEXT = 4
"""Neighbours, by their hashes, that a picture is compared with."""
KEYED = np.dtype([("key", "<u8"), ("place", "<i8"), ("sketch", "<u8")])
"""A key, whose it is, and what tells more of that."""
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
        width = prod(ROW[field].shape)

        def keyed(start: int, some: NDArray[Any]) -> NDArray[Any]:
            return _keyed(some[field].ravel(), start * width)

        for part in self.parts(keyed, len(self) * width):
            repeated, first = _repeated(part)
            later = np.flatnonzero(first != np.arange(len(first)))
            yield repeated["place"][first[later]], repeated["place"][later]

    def parts(
        self,
        keyed: Callable[[int, NDArray[Any]], NDArray[Any]],
        size: int,
        part_of: Callable[[NDArray[Any], int], NDArray[Any]] = lambda keys, parts: keys % U64(parts),
    ) -> Iterator[NDArray[Any]]:
        """All keys, a part at a time, each in the order of places.

        Args:
            keyed: gives the KEYED of samples, and of what number the first is.
            size: how many there are in all, about.
            part_of: says in which of so many parts keys are; equal ones are in one.

        Raises:
            OSError: the disk of temporary files is full; its folder is named.
        """
        parts = min(-(-max(size, 1) // AT_ONCE), PARTS)
        with files.temporary(), ExitStack() as stack:
            spools = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(parts)]
            for start, some in self.stretches():
                found = keyed(start, some)
                which = part_of(found["key"], parts).astype(np.uint16)
                found = found[np.argsort(which, kind="stable")]
                ends = np.cumsum(np.bincount(which, minlength=parts))
                for spool, one in zip(spools, np.split(found, ends[:-1]), strict=True):
                    spool.write(one.data)
            for spool in spools:
                spool.seek(0)
                yield np.fromfile(spool, KEYED)

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
        for first_band in range(0, BANDS, BESIDE):

            def keyed(start: int, some: NDArray[Any], first_band: int = first_band) -> NDArray[Any]:
                sketches, bands = _sketches(some), range(first_band, first_band + BESIDE)
                return np.concatenate([_keyed(_mixed(some, band), start, sketches) for band in bands])

            for part in self.parts(keyed, len(self) * BESIDE):
                repeated, first = _repeated(part)
                later = np.flatnonzero(first != np.arange(len(first)))
                for start in range(0, len(later), PAIRS):
                    some = later[start : start + PAIRS]
                    third = some[first[some] != some - 1]
                    one, other = np.concatenate([first[some], third - 1]), np.concatenate([some, third])
                    yield self._checked(repeated[one], repeated[other], wanted)

    def _checked(
        self, one: NDArray[Any], other: NDArray[Any], wanted: Wanted
    ) -> tuple[Rows, Rows, NDArray[np.bool_]]:
        near = np.bitwise_count(one["sketch"] ^ other["sketch"]) <= DIFFERENT
        near &= wanted(one["place"], other["place"])
        earlier, later = one["place"][near], other["place"][near]
        numbers, at = np.unique(np.concatenate([earlier, later]), return_inverse=True)
        told, (first, second) = self.take(numbers), at.reshape(2, -1)
        same = (told["pieces"][first] == told["pieces"][second]).mean(axis=1) >= SIMILAR
        bits = np.bitwise_count(told["look"][first] ^ told["look"][second])
        alike = (told["count"][first] == told["count"][second]) & (bits <= BITS).all(axis=1)
        return earlier[same], later[same], alike[same]


def picture_repeats(sets: Sequence[Printed | NDArray[Any]]) -> tuple[int, int]:
    """How many pictures are there before, byte for byte, and how many more look like another."""
    several = Alike(sets)
    size = len(several) * PICTURES
    again, alike = later(several.equal("picture"), size), np.zeros(size, bool)
    for turn in range(0, 64, 16):

        def keyed(start: int, some: NDArray[Any], turn: int = turn) -> NDArray[Any]:
            first = start * PICTURES
            own = (some["picture"].ravel() != 0) & ~again[first : first + len(some) * PICTURES]
            looks = np.where(own, some["look"].ravel(), U64(0))
            turned = (looks << U64(turn)) | (looks >> U64(64 - turn)) if turn else looks
            return _keyed(turned, first, looks)

        before = np.zeros(0, KEYED)
        for part in several.parts(keyed, size, _part_in_order):
            ordered = np.concatenate([before, part[np.argsort(part["key"], kind="stable")]])
            for start in range(0, len(ordered), STRETCH):
                some = ordered[start : start + STRETCH + NEXT]
                for step in range(1, NEXT + 1):
                    one, other = some[:-step], some[step:]
                    near = np.bitwise_count(one["sketch"] ^ other["sketch"]) <= BITS
                    alike[np.maximum(one["place"], other["place"])[near]] = True
            before = ordered[-NEXT:]
    return int(np.count_nonzero(again)), int(np.count_nonzero(alike))


def _keyed(keys: NDArray[Any], start: int, sketches: NDArray[Any] | int = 0) -> NDArray[Any]:
    """Keys of places from ``start`` on as KEYED, without those that are 0."""
    found = np.empty(len(keys), KEYED)
    found["key"], found["sketch"] = keys, sketches
    found["place"] = np.arange(start, start + len(keys))
    there: NDArray[Any] = found[keys != 0]
    return there


def _part_in_order(keys: NDArray[Any], parts: int) -> NDArray[Any]:
    """In which part a key is, where none in a part is greater than one in the next."""
    return ((keys >> U64(32)) * U64(parts)) >> U64(32)


def _sketches(some: NDArray[Any]) -> NDArray[Any]:
    """A bit of each number of texts: similar ones differ in few."""
    return np.packbits(some["pieces"] & 1 != 0, axis=1).view(U64).ravel()


def _repeated(part: NDArray[Any]) -> tuple[NDArray[Any], Rows]:
    """Those of KEYED whose key others have too, in the order of keys and places.

    Beside them, which of those that are given with it is the first that has its key.
    """
    order = np.argsort(part["key"])  # three times as quick as a stable one: places are put in order below
    keys = part["key"][order]
    same = np.zeros(len(keys) + 1, bool)
    same[1:-1] = keys[1:] == keys[:-1]
    several = same[1:] | same[:-1]
    begins = ~same[:-1][several]
    found = (np.cumsum(begins) << 32) | order[several]  # groups of one key, and numbers in each
    found.sort()
    starts = np.where(begins, np.arange(len(begins)), 0)
    return part[found & 0xFFFFFFFF], np.asarray(np.maximum.accumulate(starts))


def _mixed(some: NDArray[Any], band: int) -> NDArray[Any]:
    """One key of a band and its numbers; 0 where there is no text."""
    width = PERMUTATIONS // BANDS
    found = np.full(len(some), band, U64)
    for number in some["pieces"][:, band * width : (band + 1) * width].T:
        found = (found ^ number) * MIX
        found ^= found >> U64(29)
    return np.where(some["text"] != 0, np.maximum(found, U64(1)), U64(0))


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
