"""Packing: which documents share a sequence, so that little of it is padding.

Between two documents of a pack stands one separator token, unless the second begins with it. A
document of n tokens that needs one therefore costs n + 1 in a pack that holds ``limit`` + 1: the
separator that the first document does not need is the one more that the pack has.

>>> packing = pack(np.array([5, 4, 9, 3]), limit=13)
>>> [documents.tolist() for documents in packing]
[[0, 1], [2, 3]]
>>> packing.summary
'Packed 4 documents into 2 documents (23 tokens)'

D = documents, P = packs
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Small = NDArray[np.int32]
"""Of as many documents as fit a shard: each number takes four bytes."""
Mode = Literal["best_fit", "next_fit", "sorted_next_fit"]


# Documents longer than a sequence


@dataclass(frozen=True)
class Pieces:
    """The stretches of documents that are packed: piece i is document[i][start[i] : end[i]]."""

    document: Small
    start: Small
    end: Small
    split: int
    """Documents cut into several pieces."""
    dropped: int
    """Documents left out."""
    dropped_tokens: int

    @property
    def lengths(self) -> Small:
        """Tokens of each piece, all from 1 to the limit."""
        return self.end - self.start


def cut(lengths: NDArray[Any], limit: int, overlong: Literal["split", "drop"] = "split") -> Pieces:
    """Cut documents into pieces of at most ``limit`` tokens, or leave out those that are longer.

    Every token of a split document is in exactly one piece; all its pieces but the last are full.

    Args:
        lengths: tokens of each document, (D,).
        limit: tokens of a sequence.
        overlong: what happens to a longer document.
    """
    lengths = np.asarray(lengths, np.int32)
    longer = lengths > limit
    count = -(-lengths // limit)
    if overlong == "drop":
        count[longer] = 0
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), count)
    number = np.arange(len(document), dtype=np.int32)
    number -= np.repeat(count.cumsum(dtype=np.int32) - count, count)
    start = number * limit
    dropped = overlong == "drop"
    return Pieces(
        document=document,
        start=start,
        end=np.minimum(start + limit, lengths[document]),
        split=0 if dropped else int(longer.sum()),
        dropped=int(longer.sum()) if dropped else 0,
        dropped_tokens=int(lengths[longer].sum()) if dropped else 0,
    )


# Packs


@dataclass(frozen=True)
class Packing:
    """Documents of each pack: pack p holds order[offsets[p] : offsets[p + 1]], in file order."""

    order: Small
    """Every document once, (D,)."""
    offsets: Ints
    """Where each pack begins in ``order``, (P + 1,)."""
    lengths: Small
    """Tokens of each document, (D,)."""
    separators: NDArray[np.int8]
    """Tokens put before each document that is not the first of its pack, (D,): 1 or 0."""
    limit: int
    """Tokens that a pack may hold."""

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> Small:
        """The documents of one pack."""
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]

    def __iter__(self) -> Iterator[Small]:
        """The documents of each pack."""
        return (self[pack] for pack in range(len(self)))

    @property
    def sizes(self) -> Ints:
        """Tokens of each pack, separators among them, (P,)."""
        costs = (self.lengths + self.separators)[self.order]
        ends = np.concatenate([[0], np.cumsum(costs)])
        unneeded = self.separators[self.order[self.offsets[:-1]]]
        return np.asarray(np.diff(ends[self.offsets]) - unneeded, np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of all packs: those of the documents, and the separators between them."""
        return int(self.sizes.sum())

    @property
    def cost(self) -> int:
        """Tokens of all documents, each with the separator that it may need."""
        return int((self.lengths + self.separators).sum())

    @property
    def room(self) -> int:
        """Tokens of a pack by that measure."""
        return self.limit + int(self.separators.max(initial=0))

    @property
    def lower_bound(self) -> int:
        """No packing of these documents has fewer packs."""
        return -(-self.cost // self.room)

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens; the rest is padding."""
        return self.tokens / (len(self) * self.limit) if len(self) else 1.0

    @property
    def summary(self) -> str:
        """How many documents became how many."""
        return summary(len(self.order), len(self), self.tokens)


def summary(documents: int, packs: int, tokens: int) -> str:
    """The line that SOLO and CodeAct end with."""
    return f"Packed {documents} documents into {packs} documents ({tokens} tokens)"


def pack(
    lengths: NDArray[Any], limit: int, mode: Mode = "best_fit", separators: NDArray[Any] | int = 1
) -> Packing:
    """Decide which documents share a pack. Equal input gives equal packs.

    Packs come in the order of their first document, so that neighbours differ in length as they do
    in the file.

    Args:
        lengths: tokens of each document, (D,), each from 1 to ``limit``; see :func:`cut`.
        limit: tokens that a pack may hold.
        mode: ``best_fit``: longest first, each into the fullest pack that has room for it;
            ``next_fit``: in file order, a pack is closed when the next document does not fit;
            ``sorted_next_fit``: the same, longest first. A separator counts as a part of what follows it.
        separators: tokens that each document needs before it, (D,) or one number for all: 0 where
            it begins with a separator itself, else 1. Where only some need one, each pack may stay
            one token short of what it could hold.

    Raises:
        ValueError: a document is empty or longer than the limit.
    """
    lengths = np.asarray(lengths, np.int32)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= limit:
        sentence = f"documents of {lengths.min()} to {lengths.max()} tokens; expected 1 to {limit}: cut them"
        raise ValueError(sentence)
    needed = np.broadcast_to(np.asarray(separators, np.int8), lengths.shape)
    capacity = limit + int(needed.min(initial=1))
    # where one document of a pack needs a separator and another does not, a full one is alone anyway
    costs = np.minimum(lengths + needed, capacity)
    turn = np.arange(len(lengths), dtype=np.int32) if mode == "next_fit" else _longest_first(costs)
    assign = _best_fit if mode == "best_fit" else _next_fit
    order, offsets = _listed(*assign(costs, turn, capacity))
    return Packing(order=order, offsets=offsets, lengths=lengths, separators=needed, limit=limit)


def _longest_first(costs: Small) -> Small:
    small = costs.max(initial=0) < 1 << 16
    keys = (costs.max(initial=0) - costs).astype(np.uint16 if small else np.int32)
    return np.argsort(keys, kind="stable").astype(np.int32)


def _next_fit(costs: Small, turn: Small, capacity: int) -> tuple[Small, int]:
    """The pack of each document, and the number of packs."""
    ends = np.concatenate([[0], costs[turn].cumsum()]).data
    starts = array("q", [0])
    while starts[-1] < len(turn):
        starts.append(bisect_right(ends, ends[starts[-1]] + capacity, starts[-1]) - 1)
    pack_of = np.empty(len(turn), np.int32)
    pack_of[turn] = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
    return pack_of, len(starts) - 1


def _best_fit(costs: Small, turn: Small, capacity: int) -> tuple[Small, int]:
    """The pack of each document, and the number of packs.

    Documents of one cost are dealt out together: a pack that takes one takes as many as fit, since it is
    then still the fullest of those with room. So the work grows with the costs that there are, not with
    the documents.
    """
    pack_of = np.empty(len(costs), np.int32)
    rooms, packs = _Rooms(), 0
    none = np.zeros(1, np.int32)
    bounds = np.flatnonzero(np.diff(costs[turn], prepend=none, append=none)).tolist()
    for start, end in pairwise(bounds):
        left = turn[start:end]
        cost = int(costs[left[0]])
        while len(left):
            room = rooms.least(cost) or capacity
            each = room // cost
            wanted = -(-len(left) // each)
            if room in rooms:
                chosen = rooms.take(room, wanted)
            else:
                chosen, packs = np.arange(packs, packs + wanted, dtype=np.int32), packs + wanted
            documents, left = left[: each * len(chosen)], left[each * len(chosen) :]
            pack_of[documents] = np.repeat(chosen, each)[: len(documents)]
            full, rest = divmod(len(documents), each)
            rooms.add(room - each * cost, chosen[:full])
            rooms.add(room - rest * cost, chosen[full:])
    return pack_of, packs


class _Rooms:
    """Packs by their room: stacks of arrays, and a number whose bit r says whether a pack has room r."""

    def __init__(self) -> None:
        self._stacks: dict[int, list[Small]] = {}
        self._bits = 0

    def __contains__(self, room: int) -> bool:
        return room in self._stacks

    def least(self, cost: int) -> int:
        """The least room that a pack has and that is at least ``cost``; 0 if there is none."""
        above = self._bits >> cost
        return cost + (above & -above).bit_length() - 1 if above else 0

    def take(self, room: int, most: int) -> Small:
        """Packs of a room, the latest first: at most so many, and maybe fewer than there are."""
        stack = self._stacks[room]
        packs = stack.pop()
        if len(packs) > most:
            stack.append(packs[:-most])
        if not stack:
            del self._stacks[room]
            self._bits ^= 1 << room
        return packs[: -most - 1 : -1]

    def add(self, room: int, packs: Small) -> None:
        """Note what room some packs have now."""
        if room and len(packs):
            self._stacks.setdefault(room, []).append(packs)
            self._bits |= 1 << room


def _listed(pack_of: Small, packs: int) -> tuple[Small, Ints]:
    """Documents by pack, packs by their first document."""
    first = np.empty(packs, np.int32)
    first[pack_of[::-1]] = np.arange(len(pack_of), dtype=np.int32)[::-1]  # of several, the last one stays
    rank = np.empty(packs, np.int32)
    rank[np.argsort(first)] = np.arange(packs)
    number = rank[pack_of]
    offsets = np.concatenate([[0], np.bincount(number, minlength=packs).cumsum()])
    return np.argsort(number, kind="stable").astype(np.int32), offsets
