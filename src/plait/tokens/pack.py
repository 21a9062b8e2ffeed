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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Mode = Literal["best_fit", "next_fit", "sorted_next_fit"]
NOWHERE = 2
"""Where climbing past the root of the tree of best fit ends: one to the right of it."""


# Documents longer than a sequence


@dataclass(frozen=True)
class Pieces:
    """The stretches of documents that are packed: piece i is document[i][start[i] : end[i]]."""

    document: Ints
    start: Ints
    end: Ints
    split: int
    """Documents cut into several pieces."""
    dropped: int
    """Documents left out."""
    dropped_tokens: int

    @property
    def lengths(self) -> Ints:
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
    lengths = np.asarray(lengths, np.int64)
    longer = lengths > limit
    count = -(-lengths // limit)
    if overlong == "drop":
        count[longer] = 0
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(count.cumsum() - count, count)
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

    order: Ints
    """Every document once, (D,)."""
    offsets: Ints
    """Where each pack begins in ``order``, (P + 1,)."""
    lengths: Ints
    """Tokens of each document, (D,)."""
    separators: Ints
    """Tokens put before each document that is not the first of its pack, (D,): 1 or 0."""
    limit: int
    """Tokens that a pack may hold."""

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> Ints:
        """The documents of one pack."""
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]

    def __iter__(self) -> Iterator[Ints]:
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
    def lower_bound(self) -> int:
        """No packing of these documents has fewer packs."""
        most = self.limit + int(self.separators.max(initial=0))
        return -(-int((self.lengths + self.separators).sum()) // most)

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens; the rest is padding."""
        return self.tokens / (len(self) * self.limit) if len(self) else 1.0

    @property
    def summary(self) -> str:
        """The line that SOLO and CodeAct end with."""
        return f"Packed {len(self.order)} documents into {len(self)} documents ({self.tokens} tokens)"


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
            ``sorted_next_fit``: the same, longest first.
        separators: tokens that each document needs before it, (D,) or one number for all: 0 where
            it begins with a separator itself, else 1. Where only some need one, each pack may stay
            one token short of what it could hold.

    Raises:
        ValueError: a document is empty or longer than the limit.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= limit:
        sentence = f"documents of {lengths.min()} to {lengths.max()} tokens; expected 1 to {limit}: cut them"
        raise ValueError(sentence)
    assign = _compiled(_best_fit if mode == "best_fit" else _next_fit)
    turn = np.arange(len(lengths)) if mode == "next_fit" else _longest_first(lengths)
    needed = np.broadcast_to(np.asarray(separators, np.int64), lengths.shape)
    capacity = limit + int(needed.min(initial=1))
    # where one document of a pack needs a separator and another does not, a full one is alone anyway
    costs = np.minimum(lengths + needed, capacity)
    order, offsets = _compiled(_listed)(*assign(costs, turn, capacity))
    return Packing(order=order, offsets=offsets, lengths=lengths, separators=needed, limit=limit)


def _longest_first(lengths: Ints) -> Ints:
    small = lengths.max(initial=0) < 1 << 16
    keys = (lengths.max(initial=0) - lengths).astype(np.uint16 if small else np.int64)
    return np.argsort(keys, kind="stable")


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    return numba.njit(function)  # type: ignore[no-any-return]


def _next_fit(costs: Ints, turn: Ints, capacity: int) -> tuple[Ints, int]:
    """The pack of each document, and the number of packs."""
    pack_of = np.empty(len(costs), np.int64)
    packs, room = 0, 0
    for document in turn:
        if costs[document] > room:
            packs, room = packs + 1, capacity
        room -= costs[document]
        pack_of[document] = packs - 1
    return pack_of, packs


def _best_fit(costs: Ints, turn: Ints, capacity: int) -> tuple[Ints, int]:
    """The pack of each document, and the number of packs.

    ``top[r]`` heads a list of packs with room r. ``some`` is a binary tree over all r: a node says
    whether some pack below it has that room. The least room that fits is found by climbing from
    the wanted one until there is something to the right, and descending to the leftmost of it.
    """
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    some = np.zeros(2 * leaves, np.bool_)
    top = np.full(capacity + 1, -1, np.int64)
    below = np.empty(len(costs), np.int64)
    pack_of = np.empty(len(costs), np.int64)
    packs = 0
    for document in turn:
        cost = costs[document]
        node = leaves + cost
        if not some[node]:
            while node > 1 and (node % 2 or not some[node + 1]):
                node //= 2
            node += 1
        if node == NOWHERE:
            chosen, room = packs, capacity
            packs += 1
        else:
            while node < leaves:
                node = 2 * node if some[2 * node] else 2 * node + 1
            room = node - leaves
            chosen = top[room]
            top[room] = below[chosen]
            if top[room] < 0:
                some[node] = False
                while node > 1 and not some[node ^ 1]:
                    node //= 2
                    some[node] = False
        pack_of[document] = chosen
        room -= cost
        below[chosen] = top[room]
        top[room] = chosen
        node = leaves + room
        while node and not some[node]:
            some[node] = True
            node //= 2
    return pack_of, packs


def _listed(pack_of: Ints, packs: int) -> tuple[Ints, Ints]:
    """Documents by pack, packs by their first document."""
    rank = np.full(packs, -1, np.int64)
    offsets = np.zeros(packs + 1, np.int64)
    seen = 0
    for document in range(len(pack_of)):
        if rank[pack_of[document]] < 0:
            rank[pack_of[document]] = seen
            seen += 1
        offsets[rank[pack_of[document]] + 1] += 1
    for number in range(packs):
        offsets[number + 1] += offsets[number]
    free = offsets[:-1].copy()
    order = np.empty(len(pack_of), np.int64)
    for document in range(len(pack_of)):
        number = rank[pack_of[document]]
        order[free[number]] = document
        free[number] += 1
    return order, offsets
