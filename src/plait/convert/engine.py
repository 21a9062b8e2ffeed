"""A model's tensors in every format and grid, from one form to another.

``to_mcore`` and ``to_hf`` change the format, ``cut`` and ``join`` the grid. All are lazy: they give a mapping
that computes a tensor when it is asked for, so they compose without holding a model. Files are converted by
``stream.py``, which reads the same forms.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plait.convert import forms
from plait.convert.forms import Form, Move, Place, Sources
from plait.convert.ops import Held, Shape
from plait.convert.tables import carried
from plait.errors import CheckpointError, PlaitError
from plait.models.specs import Spec
from plait.models.weights import Tensors
from plait.parallel.grid import Grid

State = Mapping[str, Tensor]


def to_mcore(hf: State, spec: Spec) -> State:
    """Megatron's whole tensors, with the true vocabulary, from Hugging Face's."""
    return remade(forms.whole(spec), [(forms.identity(_converted(spec)), hf)])


def to_hf(mcore: State, spec: Spec) -> State:
    """Hugging Face's tensors from Megatron's whole ones, but for those that Megatron has no use for."""
    return remade(forms.identity(_converted(spec)), [(forms.whole(spec), mcore)])


def cut(mcore: State, spec: Spec, grid: Grid, tp_rank: int, pp_rank: int) -> State:
    """What one rank of a grid holds, under the names of its stage.

    Raises:
        ConfigError: the model cannot be cut for this grid.
    """
    return remade(forms.of_rank(spec, grid, Place(tp_rank, pp_rank)), [(forms.whole(spec), mcore)])


def own_experts(state: State, *, spec: Spec, grid: Grid, pp_rank: int, ep_rank: int, ep: int) -> State:
    """What one of ``ep`` expert parallel ranks holds of what all of a stage's experts are held with.

    It has an equal share of each layer's experts, in their order, numbered from 0; all else is as it was.
    """
    held, own = (
        forms.of_rank(spec, grid, Place(0, pp_rank, number), ep=size)
        for number, size in ((0, 1), (ep_rank, ep))
    )
    places = {held[name].pieces: name for name in held}
    found = Tensors()
    for name, one in own.items():
        found.add((name,), lambda n=name, s=places[one.pieces]: {n: _take(state, s)})  # type: ignore[misc]
    return found


def join(ranks: Mapping[tuple[int, int], State], spec: Spec, grid: Grid) -> State:
    """Megatron's whole tensors from what the ranks ``(tp, pp)`` of a grid hold.

    Raises:
        CheckpointError: a rank lacks a tensor, or ranks that should hold the same one do not, when that is
            asked for.
    """
    held = [(forms.of_rank(spec, grid, Place(*place)), ranks[place]) for place in grid]
    return remade(forms.whole(spec), held)


def rank_shapes(
    spec: Spec, grid: Grid | None, tp_rank: int = 0, pp_rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a rank holds; of Megatron's whole model where there is no grid."""
    form = forms.whole(spec) if grid is None else forms.of_rank(spec, grid, Place(tp_rank, pp_rank))
    return {name: held.shape for name, held in form.items()}


def remade(target: Form, sources: Sequence[tuple[Form, State]]) -> Tensors:
    """The tensors of a form, made of those of others when they are asked for."""
    states = [state for _, state in sources]
    index = Sources(
        ((number, name, held), held)
        for number, (form, _) in enumerate(sources)
        for name, held in form.items()
    )
    found = Tensors()
    for name, held in target.items():
        found.add((name,), lambda n=name, h=held: {n: _made(n, h, index, states)})  # type: ignore[misc]
    return found


def _made(name: str, held: Held, index: Sources, states: Sequence[State]) -> Tensor:
    """One tensor; where it is a piece of another, unmoved, it is a view of that."""
    moves = sorted(index.moves(held), key=lambda move: move.copy)
    if not moves:
        raise CheckpointError(f"the checkpoint has nothing of {name}")
    read: dict[tuple[int, str], Tensor] = {}
    first = _box(moves[0], states, read)
    is_view = first.numel() == held.elements
    made = first.reshape(held.shape) if is_view else first.new_zeros(held.shape)
    rows = made.reshape(held.matrix)
    for move in moves[is_view:]:
        box = _box(move, states, read)
        if box.dtype != made.dtype:
            raise CheckpointError(f"{name} is made of {made.dtype} and {box.dtype}; a tensor has one type")
        place = rows[move.to_row : move.to_row + move.rows, move.to_col : move.to_col + move.cols]
        if not move.copy:
            place.copy_(box)
        elif not torch.equal(_bytes(place), _bytes(box)):
            raise CheckpointError(f"{name}: tensor ranks hold different copies of a replicated tensor")
    return made


def _bytes(tensor: Tensor) -> Tensor:
    """Its bytes: numbers that are none are equal to themselves there."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _box(move: Move, states: Sequence[State], read: dict[tuple[int, str], Tensor]) -> Tensor:
    """A box of a tensor, which is read once for all of its boxes."""
    number, name, held = move.source
    if (number, name) not in read:
        read[number, name] = _take(states[number], name)
    tensor = read[number, name]
    if tuple(tensor.shape) != held.shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, its config says {held.shape}")
    rows = tensor.reshape(held.matrix)
    return rows[move.row : move.row + move.rows, move.col : move.col + move.cols]


def _converted(spec: Spec) -> dict[str, Shape]:
    """The tensors that Megatron computes with."""
    beside = carried(spec)
    return {name: shape for name, shape in spec.shapes.items() if name not in beside}


def _take(state: State, name: str) -> Tensor:
    try:
        return state[name]
    except PlaitError:
        raise
    except KeyError as error:
        raise CheckpointError(f"the checkpoint has no tensor {name}") from error
