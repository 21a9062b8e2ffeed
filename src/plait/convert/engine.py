"""A model in every format and grid, by reading the rows of its table.

``to_mcore`` and ``to_hf`` change the format, ``cut`` and ``join`` the grid. All four are lazy: they
give a mapping that computes a tensor when it is asked for, so they compose without holding a model,
and the composition of a direction with its inverse is the identity (tested, and proven for each
artifact by its Merkle root).

``coverage`` runs the very same operations on element numbers instead of weights. It finds what a
round trip forgives: an element written twice, or a wrong cut undone by an equally wrong join.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait.convert.tables import Entry, carried, entries
from plait.errors import CheckpointError, PlaitError
from plait.models.specs import Spec
from plait.models.weights import Tensors, merkle
from plait.parallel.grid import Grid

__all__ = ["coverage", "cut", "join", "merkle", "rank_shapes", "to_hf", "to_mcore"]

State = Mapping[str, Tensor]


def to_mcore(hf: State, spec: Spec) -> State:
    """Megatron's whole tensors, with the true vocabulary, from Hugging Face's."""

    def fuse(entry: Entry) -> dict[str, Tensor]:
        return {entry.mcore: entry.row.op.fuse([_take(hf, name) for name in entry.hf], entry.shape)}

    return _lazy(entries(spec), lambda entry: (entry.mcore,), fuse)


def to_hf(mcore: State, spec: Spec) -> State:
    """Hugging Face's tensors from Megatron's whole ones."""

    def split(entry: Entry) -> dict[str, Tensor]:
        return dict(zip(entry.hf, entry.row.op.split(_take(mcore, entry.mcore), entry.shape), strict=True))

    return _lazy(entries(spec), lambda entry: entry.hf, split)


def cut(mcore: State, spec: Spec, grid: Grid, tp_rank: int, pp_rank: int) -> State:
    """What one rank of a grid holds, under the names of its stage.

    Raises:
        ConfigError: the model cannot be cut for this grid.
    """

    def part(entry: Entry) -> dict[str, Tensor]:
        op = entry.row.op
        return {
            entry.local(spec, grid): op.cut(_take(mcore, entry.mcore), entry.shape, tp=grid.tp, rank=tp_rank)
        }

    here = [entry for entry in entries(spec) if entry.stage(spec, grid) == pp_rank]
    return _lazy(here, lambda entry: (entry.local(spec, grid),), part)


def own_experts(state: State, *, spec: Spec, grid: Grid, pp_rank: int, ep_rank: int, ep: int) -> State:
    """What one of ``ep`` expert parallel ranks holds of what all of a stage's experts are held with.

    It has an equal share of each layer's experts, in their order, numbered from 0; all else is as it was.
    """
    share = spec.num_experts // ep
    first = ep_rank * share

    def local(entry: Entry) -> tuple[str]:
        return (entry.local(spec, grid, first_expert=first if entry.row.is_experts else 0),)

    def take(entry: Entry) -> dict[str, Tensor]:
        return {local(entry)[0]: _take(state, entry.local(spec, grid))}

    here = (entry for entry in entries(spec) if entry.stage(spec, grid) == pp_rank)
    own = [one for one in here if not one.row.is_experts or first <= one.expert < first + share]
    return _lazy(own, local, take)


def join(ranks: Mapping[tuple[int, int], State], spec: Spec, grid: Grid) -> State:
    """Megatron's whole tensors from what the ranks ``(tp, pp)`` of a grid hold.

    Raises:
        CheckpointError: a rank lacks a tensor, when that is asked for.
    """

    def whole(entry: Entry) -> dict[str, Tensor]:
        stage, name = entry.stage(spec, grid), entry.local(spec, grid)
        parts = [_take(ranks[tp, stage], name) for tp in range(grid.tp)]
        try:
            return {entry.mcore: entry.row.op.join(parts, entry.shape)}
        except CheckpointError as error:
            raise CheckpointError(f"{entry.mcore}: {error}") from error

    return _lazy(entries(spec), lambda entry: (entry.mcore,), whole)


def rank_shapes(
    spec: Spec, grid: Grid | None, tp_rank: int = 0, pp_rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a rank holds; of Megatron's whole model where there is no grid."""
    hf = {name: torch.empty(shape, device="meta") for name, shape in spec.shapes.items()}
    state = to_mcore(hf, spec)
    if grid is not None:
        state = cut(state, spec, grid, tp_rank, pp_rank)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


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

    Every element of the Hugging Face model gets a number from 1; the operations carry numbers where
    they carry weights, and 0 is padding. A row's operation sees only shapes, and those are equal in
    all layers, so numbers are followed in layer 0 and its counts hold for the others; names are
    checked in all of them.

    Args:
        spec: the model.
        grid: the grid it is cut for; None is Megatron's whole model, without padding.

    Returns:
        Counts of tensors and elements; ``padded`` names the padded tensors, carried ones stand beside.

    Raises:
        CheckpointError: an element is lost, doubled or misplaced; the tensor is named.
        ConfigError: the model cannot be cut for this grid.
    """
    _check_names(spec, grid)
    beside = carried(spec)
    counts = Counts(
        carried_tensors=len(beside),
        carried_elements=sum(torch.Size(shape).numel() for shape in beside.values()),
    )
    seen: dict[str, tuple[int, int]] = {}
    for entry in entries(spec):
        if entry.row.mcore not in seen:
            seen[entry.row.mcore] = _follow(entry, spec, grid)
        elements, padding = seen[entry.row.mcore]
        copies = grid.tp if grid else 1
        replicated = elements * (copies - 1) if entry.row.op.replicated else 0
        counts.hf_tensors += len(entry.hf)
        counts.hf_elements += elements
        counts.mcore_tensors += 1
        counts.rank_tensors += copies
        counts.rank_elements += elements + replicated + padding
        counts.replicated_elements += replicated
        counts.padding_elements += padding
        if padding:
            counts.padded[entry.mcore] = padding
    return counts.report()


def _follow(entry: Entry, spec: Spec, grid: Grid | None) -> tuple[int, int]:
    """Follow the element numbers of one row there and back; its elements and its padding."""
    op = entry.row.op
    sources, elements = [], 0
    for name in entry.hf:
        shape = spec.shapes[name]
        size = torch.Size(shape).numel()
        sources.append(torch.arange(elements + 1, elements + size + 1).view(shape))
        elements += size
    whole = op.fuse(sources, entry.shape)
    _check_once(whole, elements, entry.mcore)
    if grid is None:
        return elements, 0
    parts = [op.cut(whole, entry.shape, tp=grid.tp, rank=rank) for rank in range(grid.tp)]
    if op.replicated:
        for part in parts:
            _check_once(part, elements, entry.mcore)
        padding = 0
    else:
        padding = _check_once(torch.cat([part.flatten() for part in parts]), elements, entry.mcore)
    back = op.split(op.join(parts, entry.shape), entry.shape)
    if not all(torch.equal(one, other) for one, other in zip(back, sources, strict=True)):
        raise CheckpointError(f"coverage: {entry.mcore} does not come back as it went")
    return elements, padding


def _check_once(numbers: Tensor, elements: int, name: str) -> int:
    """Check that each number from 1 stands once; the count of zeros, which are padding."""
    times = torch.bincount(numbers.flatten(), minlength=elements + 1)
    if len(times) != elements + 1 or not bool((times[1:] == 1).all()):
        wrong = int((times[1:] != 1).sum())
        raise CheckpointError(f"coverage: {wrong} elements of {name} are lost or written twice")
    return int(times[0])


def _check_names(spec: Spec, grid: Grid | None) -> None:
    """Every Hugging Face name in one row, every name of a rank once, every stage with its layers."""
    listed = [*carried(spec), *(name for entry in entries(spec) for name in entry.hf)]
    if sorted(listed) != sorted(spec.shapes):
        odd = sorted(set(listed) ^ set(spec.shapes)) or sorted({n for n in listed if listed.count(n) > 1})
        raise CheckpointError(f"coverage: {odd[0]} is not in exactly one row of the table")
    if grid is None:
        return
    placed = [(entry.stage(spec, grid), entry.local(spec, grid)) for entry in entries(spec)]
    if len(set(placed)) != len(placed):
        raise CheckpointError("coverage: two parameters have one name on one rank")


def _lazy(
    found: Iterable[Entry],
    names: Callable[[Entry], tuple[str, ...]],
    make: Callable[[Entry], Mapping[str, Tensor]],
) -> Tensors:
    state = Tensors()
    for entry in found:
        state.add(names(entry), lambda entry=entry: make(entry))  # type: ignore[misc]
    return state


def _take(state: State, name: str) -> Tensor:
    try:
        return state[name]
    except PlaitError:
        raise
    except KeyError as error:
        raise CheckpointError(f"the checkpoint has no tensor {name}") from error
