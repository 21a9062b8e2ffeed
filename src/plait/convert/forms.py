"""The forms a model takes: Hugging Face's tensors, Megatron's whole ones, and what each rank of a grid holds.

A form says of every tensor which boxes of Hugging Face's it is made of. It follows from the config alone, so
a conversion is known, and proven, before a byte of the model is read: each element is written once, and each
is read once.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from plait.convert.ops import Held, Part, Piece, Shape, matrix
from plait.convert.tables import Entry, carried, entries
from plait.errors import CheckpointError, ConfigError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.tokens.vocabulary import DIVISOR

Form = Mapping[str, Held]
"""A tensor's name, and what it holds."""


class Place(NamedTuple):
    """A rank of a grid, or of a checkpoint."""

    tp: int = 0
    pp: int = 0
    ep: int = 0


def identity(shapes: Mapping[str, Shape]) -> dict[str, Held]:
    """Hugging Face's tensors themselves."""
    return {name: Held(shape, (Piece(name, 0, 0, *matrix(shape), 0, 0),)) for name, shape in shapes.items()}


def whole(spec: Spec) -> dict[str, Held]:
    """Megatron's whole tensors, with the true vocabulary."""
    return {entry.mcore: _held(entry, spec, Part()) for entry in entries(spec)}


def of_rank(spec: Spec, grid: Grid, place: Place, *, ep: int = 1, divisor: int = DIVISOR) -> dict[str, Held]:
    """What a rank holds, under the names of its stage.

    Args:
        spec: the model.
        grid: the grid.
        place: the rank.
        ep: expert parallel ranks, each with an equal share of a layer's experts, numbered from 0.
        divisor: the vocabulary is padded to a multiple of it times the tensor ranks.

    Raises:
        ConfigError: the model cannot be cut for this grid.
    """
    if ep > 1 and (not spec.num_experts or spec.num_experts % ep):
        legal = [n for n in range(1, spec.num_experts + 1) if spec.num_experts % n == 0] or [1]
        raise ConfigError(
            f"{spec.num_experts} experts do not divide among {ep} expert parallel ranks",
            hint=f"ep may be {', '.join(map(str, legal))}",
        )
    found = {}
    share = max(1, spec.num_experts // ep)
    for entry in entries(spec, pp=grid.pp):
        if entry.stage(spec, grid) != place.pp:
            continue
        if entry.row.is_experts and entry.expert // share != place.ep:
            continue
        held = _held(entry, spec, Part(place.tp, grid.tp, divisor))
        # experts stand on one of the ranks that share them, all else on each
        copy = held.copy + (0 if entry.row.is_experts else place.ep * 2 * grid.tp)
        first = place.ep * share if entry.row.is_experts else 0
        found[entry.local(spec, grid, first_expert=first)] = replace(held, copy=copy)
    return found


def of_grid(spec: Spec, grid: Grid, *, ep: int = 1, divisor: int = DIVISOR) -> dict[Place, dict[str, Held]]:
    """What every rank holds, by its place."""
    places = (Place(tp, pp, number) for number in range(ep) for tp, pp in grid)
    return {place: of_rank(spec, grid, place, ep=ep, divisor=divisor) for place in places}


def _held(entry: Entry, spec: Spec, part: Part) -> Held:
    shapes = [spec.shapes[name] for name in entry.hf]
    held = entry.row.op.held(entry.hf, shapes, entry.shape, part)
    return replace(held, copy=part.tp) if entry.row.tied else held


# The proof


@dataclass
class Counts:
    """What a proof of coverage counted."""

    hf_tensors: int = 0
    hf_elements: int = 0
    mcore_tensors: int = 0
    rank_tensors: int = 0
    rank_elements: int = 0
    replicated_elements: int = 0
    padding_elements: int = 0
    carried_tensors: int = 0
    carried_elements: int = 0
    padded: dict[str, int] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """The counts as JSON, after checking that they balance.

        Raises:
            CheckpointError: they do not.
        """
        placed = self.rank_elements - self.replicated_elements - self.padding_elements
        if placed != self.hf_elements:
            raise CheckpointError(f"coverage: {placed} elements were placed of {self.hf_elements}")
        return {**vars(self), "written_once": True, "read_once": True}


def coverage(spec: Spec, grid: Grid | None = None) -> dict[str, Any]:
    """Prove that a conversion writes each element once and reads each element once.

    Args:
        spec: the model.
        grid: the grid it is cut for; None is Megatron's whole model, without padding.

    Returns:
        Counts of tensors and elements; ``padded`` names the padded tensors, carried ones stand beside.

    Raises:
        CheckpointError: an element is lost, doubled or misplaced; the tensor is named.
        ConfigError: the model cannot be cut for this grid.
    """
    size, divisor = grid or Grid(), DIVISOR if grid else 1
    beside = carried(spec)
    forms = of_grid(spec, size, divisor=divisor)
    check_once((held for form in forms.values() for held in form.values()), spec.shapes, beside)
    counts = Counts(
        carried_tensors=len(beside),
        carried_elements=sum(rows * cols for rows, cols in map(matrix, beside.values())),
    )
    for entry in entries(spec, pp=size.pp):
        stage, name = entry.stage(spec, size), entry.local(spec, size)
        held = [forms[Place(tp, stage)][name] for tp in range(size.tp)]
        elements, padding = sum(one.elements for one in held), sum(one.padding for one in held)
        copies = sum(one.elements - one.padding for one in held if one.copy)
        counts.rank_tensors += len(held)
        counts.rank_elements += elements
        counts.replicated_elements += copies
        counts.padding_elements += padding
        if not entry.row.tied:
            counts.hf_tensors += len(entry.hf)
            counts.hf_elements += elements - padding - copies
            counts.mcore_tensors += 1
        if padding:
            counts.padded[entry.mcore] = padding
    return counts.report()


def check_once(held: Iterable[Held], shapes: Mapping[str, Shape], beside: Iterable[str] = ()) -> None:
    """Check what a form holds: each element of each tensor once, and once more in each copy of it.

    Args:
        held: all of the form.
        shapes: Hugging Face's tensors.
        beside: those of them that the form does not hold.

    Raises:
        CheckpointError: an element is lost or stands twice; the tensor is named.
    """
    copies: dict[str, dict[int, list[Piece]]] = {name: {} for name in shapes}
    for one in held:
        _check_apart(one)
        for piece in one.pieces:
            if piece.hf not in copies:
                raise CheckpointError(f"coverage: {piece.hf} is in a row of the table and not in the model")
            copies[piece.hf].setdefault(one.copy, []).append(piece)
    absent = set(beside)
    for name, found in copies.items():
        if name in absent and found:
            raise CheckpointError(f"coverage: {name} is held and carried beside too")
        if name not in absent and 0 not in found:
            raise CheckpointError(f"coverage: {name} is in no row of the table")
        for pieces in found.values():
            size = matrix(shapes[name])
            times = times_covered([(p.row, p.col, p.rows, p.cols) for p in pieces], size)
            if times.keys() != {1}:
                wrong = sum(count for often, count in times.items() if often != 1)
                raise CheckpointError(f"coverage: {wrong} elements of {name} are lost or written twice")


def _check_apart(held: Held) -> None:
    """No two boxes of a tensor stand on one another."""
    times = times_covered([(p.at_row, p.at_col, p.rows, p.cols) for p in held.pieces], held.matrix)
    if times.keys() - {0, 1}:
        name = held.pieces[0].hf
        raise CheckpointError(f"coverage: elements of {name} are written over others'")


def times_covered(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> dict[int, int]:
    """How many elements of a matrix lie in how many boxes.

    Args:
        boxes: first row, first column, rows, columns of each.
        size: rows and columns of the matrix.

    >>> times_covered([(0, 0, 2, 3), (1, 0, 1, 3)], (3, 3))
    {0: 3, 1: 3, 2: 3}

    Raises:
        CheckpointError: a box does not lie in the matrix.
    """
    rows, cols = size
    if boxes == [(0, 0, rows, cols)]:
        return {1: rows * cols}
    found = np.array(boxes, dtype=np.int64).reshape(-1, 4)
    starts, ends = found[:, :2], found[:, :2] + found[:, 2:]
    if (starts < 0).any() or (ends > size).any():
        raise CheckpointError(f"coverage: a box does not lie in its tensor of {rows} x {cols}")
    edges = [np.unique(np.concatenate((starts[:, i], ends[:, i], [0, size[i]]))) for i in (0, 1)]
    (top, left), (bottom, right) = (
        [np.searchsorted(edges[i], ends_or_starts[:, i]) for i in (0, 1)] for ends_or_starts in (starts, ends)
    )
    change = np.zeros((len(edges[0]), len(edges[1])), dtype=np.int64)
    for row, col, by in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(change, (row, col), by)
    often = change.cumsum(0).cumsum(1)[:-1, :-1]
    areas = np.outer(np.diff(edges[0]), np.diff(edges[1]))
    return {int(n): int(areas[often == n].sum()) for n in np.unique(often)}


# From one form to another


class Move(NamedTuple):
    """A box of one tensor that goes to a box of another."""

    source: Any
    copy: int
    row: int
    col: int
    rows: int
    cols: int
    to_row: int
    to_col: int


class Sources:
    """Which tensors hold which boxes of Hugging Face's."""

    def __init__(self, held: Iterable[tuple[Any, Held]]) -> None:
        """Index the boxes of tensors, each with a word for its tensor."""
        self._by_name: dict[str, list[tuple[Piece, int, Any]]] = {}
        for key, one in held:
            for piece in one.pieces:
                self._by_name.setdefault(piece.hf, []).append((piece, one.copy, key))

    def moves(self, held: Held) -> Iterator[Move]:
        """What comes from where into a tensor, of every copy of it that there is."""
        for to in held.pieces:
            for piece, copy, key in self._by_name.get(to.hf, ()):
                row, col = max(to.row, piece.row), max(to.col, piece.col)
                rows = min(to.row + to.rows, piece.row + piece.rows) - row
                cols = min(to.col + to.cols, piece.col + piece.cols) - col
                if rows >= min(1, to.rows) and cols > 0:  # padding alone has a box of no rows, for its type
                    yield Move(
                        key,
                        copy,
                        row - piece.row + piece.at_row,
                        col - piece.col + piece.at_col,
                        rows,
                        cols,
                        row - to.row + to.at_row,
                        col - to.col + to.at_col,
                    )
