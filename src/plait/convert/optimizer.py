"""The optimizer's state beside a model's weights, from any layout and grid to any other.

In ``torch_dist`` a state's name stands before its parameter's. In the classic layout states are numbered by
the parameter's place: those with weight decay first, then vectors and biases, both in the order of the
model's modules. Experts have an optimizer of their own behind that of all else, in the classic layout where
they are dealt out only.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from plait.convert import checkpoint, torch_dist
from plait.convert.checkpoint import Rank
from plait.convert.forms import Form
from plait.convert.moments import (
    DISTRIBUTED,
    MASTER,
    MASTERS,
    MOMENTS,
    Optimizer,
    Rest,
    chain_of,
    decays,
    fill,
    group_decays,
    in_order,
    inner_of,
    module_order,
    no_state,
    of_experts,
    parts_of,
    progress,
    rooms_for,
    shapes_of,
    unknown_form,
    values_of,
    wrapped,
)
from plait.convert.ops import Held
from plait.convert.stream import Model, Placed, type_of
from plait.convert.torch_dist import COMMON, METADATA, STATE, TorchDist
from plait.errors import CheckpointError
from plait.models.archive import Archive, Room
from plait.models.specs import Spec
from plait.models.stored import Stored
from plait.parallel.grid import Grid

PER_MASTER = {False: "fp32_param", True: "param"}
"""What torch_dist calls masters, by whether the optimizer is distributed."""
RESHARDABLE = "fully_reshardable"
CHAINED, KIND = "chained_{}.", re.compile(r"^(?:chained_[01]\.)?optimizer\.state\.([^.]+)\.")
"""What stands before all else where experts have their own optimizer; and a kind of state in a name."""


class Parameter(NamedTuple):
    """A parameter of a rank."""

    name: str
    held: Held


def found(place: Path, spec: Spec) -> Optimizer:
    """The optimizer's state of a checkpoint.

    Args:
        place: an iteration of a torch_dist checkpoint, or a classic checkpoint.
        spec: the model.

    Raises:
        CheckpointError: there is none, it is not whole, or it is stored in a way that is not read.
    """
    if (place / METADATA).is_file():
        return _of_torch_dist(place, spec)
    if not checkpoint.saved(place).is_dir():
        raise no_state(place)
    return _of_classic(place, spec)


# torch_dist


def _of_torch_dist(folder: Path, spec: Spec) -> Optimizer:
    common = values_of(Archive(folder / COMMON).content) if (folder / COMMON).is_file() else {}
    names = TorchDist(folder).shapes
    kinds = {found[1] for found in map(KIND.search, names) if found}
    outer = common.get("optimizer") or {}
    trees = [one for one in (outer, *outer.values()) if isinstance(one, dict) and DISTRIBUTED in one]
    forms = {str(one[DISTRIBUTED]) for one in trees}
    if forms - {RESHARDABLE}:
        raise CheckpointError(
            f"{folder} has the state of a distributed optimizer as {min(forms)}",
            hint=f"{RESHARDABLE} is what is read: Megatron-LM has --dist-ckpt-optim-fully-reshardable",
        )
    if not outer or not kinds or "iteration" not in common:
        raise no_state(folder)
    chain, form = chain_of(folder / COMMON, outer), min(forms, default=None)
    master = PER_MASTER[form is not None]
    if kinds - {*MOMENTS, master}:
        raise CheckpointError(
            f"{folder} has the optimizer's {min(kinds - {*MOMENTS, master})}, which is not converted"
        )
    if any((master in kinds) != ("optimizer" in one) for one in chain):
        raise unknown_form(folder / COMMON)
    before = CHAINED if any(name.startswith(CHAINED.format(0)) for name in names) else ""
    trained = {KIND.sub("", name).partition(".")[0] for name in names if KIND.search(name)}
    frozen = parts_of(spec) - trained
    shapes = shapes_of(spec, frozen)
    states = {
        MASTER if kind == master else kind: Model(
            torch_dist.sources(folder, spec, before + STATE.format(kind), without=frozen), shapes
        )
        for kind in sorted(kinds)
    }
    rest = Rest(
        iteration=common["iteration"],
        groups=in_order(folder, chain),
        step=inner_of(chain[0]).get("state", {}).get("common_step"),
        scaler=chain[0].get("grad_scaler"),
        schedule=common.get("opt_param_scheduler"),
        distributed=form is not None,
        frozen=frozen,
    )
    return Optimizer(folder, states, rest)


def to_torch_dist(
    folder: Path, spec: Spec, dtypes: Mapping[str, str], optimizer: Optimizer
) -> dict[str, list[Placed]]:
    """Make the files of an iteration with room for weights and optimizer; where each kind stands.

    The weights' kind is "".
    """
    rest, before = optimizer.rest, CHAINED if spec.num_experts else ""
    prefixes = {
        kind: before + STATE.format(PER_MASTER[rest.distributed] if kind == MASTER else kind)
        for kind in optimizer.states
    }
    types = {prefixes[kind]: known for kind, known in optimizer.dtypes.items()}
    step = {} if rest.step is None else {"state": {"common_step": rest.step}}
    form = {DISTRIBUTED: RESHARDABLE} if rest.distributed else {}
    all_else = [dict(group) for group in rest.groups]
    both = [
        wrapped(optimizer, {"param_groups": groups, **step}) | form
        for groups in (all_else, [of_experts(all_else[0])])
    ]
    common = {"optimizer": dict(enumerate(both)) if spec.num_experts else both[0], **progress(rest)}
    placed = torch_dist.lay_out(folder, spec, {"": dtypes, **types}, common, without=rest.frozen)
    return {"": placed[""], **{kind: placed[prefix] for kind, prefix in prefixes.items()}}


# Classic


def _of_classic(folder: Path, spec: Spec) -> Optimizer:
    placed: dict[str, list[Placed]] = {}
    rests, steps = [], set()
    ranks = list(checkpoint.ranks(folder, spec))
    frozen = _frozen(ranks, spec)
    for rank in ranks:
        rests.append(replace(_rest(rank), frozen=frozen))
        for kind, one in _numbered(rank, frozen):
            placed.setdefault(kind, []).append(one)
        steps |= _steps(rank)
        if len(steps) > 1:
            raise CheckpointError(
                f"{rank.path}: its optimizer has made {' and '.join(f'{n:g}' for n in sorted(steps))} steps",
                hint="the files are of different checkpoints",
            )
    shapes = shapes_of(spec, frozen)
    return Optimizer(folder, {kind: Model(some, shapes) for kind, some in sorted(placed.items())}, rests[0])


def _frozen(ranks: Sequence[Rank], spec: Spec) -> frozenset[str]:
    """The parts of a LLaVA model without which each rank has as many parameters as its optimizer."""
    parts = sorted(parts_of(spec))
    some = (frozenset(one) for count in range(len(parts)) for one in combinations(parts, count))
    fit = [frozen for frozen in some if all(_fits(rank, frozen) for rank in ranks)]
    return fit[0] if len(fit) == 1 else frozenset()


def _fits(rank: Rank, frozen: frozenset[str]) -> bool:
    groups = inner_of(_optimizers(rank)[0])["param_groups"]
    parameters = _trained(rank, frozen)
    return all(
        len(_members(parameters, decayed=group_decays(group), experts=None)) == len(group["params"])
        for group in groups
    )


def _trained(rank: Rank, frozen: frozenset[str]) -> list[Parameter]:
    """The parameters of a rank that have a state."""
    found = (Parameter(one.name, one.held) for part in rank.parts.values() for one in part)
    return [one for one in found if one.name.partition(".")[0] not in frozen]


def _rest(rank: Rank) -> Rest:
    """What a rank's file has of the optimizer that is no parameter's."""
    chain = _optimizers(rank)
    return Rest(
        iteration=rank.content["iteration"],
        groups=in_order(
            rank.path, values_of([{"param_groups": inner_of(one)["param_groups"]} for one in chain])
        ),
        step=next((values_of(state.get("step")) for state in inner_of(chain[0])["state"].values()), None),
        scaler=values_of(chain[0].get("grad_scaler")),
        schedule=values_of(rank.content.get("opt_param_scheduler")),
    )


def _steps(rank: Rank) -> set[float]:
    """How many steps a rank's optimizer has made, by all that count them."""
    inner = [inner_of(one) for one in _optimizers(rank)]
    counts = [
        values_of(one.get("step"))
        for some in inner
        for one in (*some["param_groups"], *some["state"].values())
    ]
    return {float(count) for count in counts if count is not None}


def _optimizers(rank: Rank) -> list[Mapping[str, Any]]:
    """The optimizers of a rank's file.

    Raises:
        CheckpointError: it has none, or one that is not read.
    """
    outer = rank.content.get("optimizer")
    if not outer:
        raise no_state(rank.path)
    if rank.is_old:
        raise unknown_form(rank.path)
    found = chain_of(rank.path, outer)
    if not all("state" in inner_of(one) for one in found):
        raise CheckpointError(
            f"{rank.path} has no moments: those of a distributed optimizer stand beside, by its buckets",
            hint="that form is not converted: save it by --ckpt-format torch_dist",
        )
    if not inner_of(found[0])["state"] and any(
        one.get("params") for one in inner_of(found[0])["param_groups"]
    ):
        raise no_state(rank.path)
    if not all(map(_is_numbered, found)) or not isinstance(rank.content.get("iteration"), int):
        raise unknown_form(rank.path)
    return found


def _is_numbered(one: Mapping[str, Any]) -> bool:
    """Whether parameters have numbers, and their states stand below these; masters beside, or none."""
    return (
        all(isinstance(group.get("params"), list) for group in inner_of(one)["param_groups"])
        and all(isinstance(state, dict) for state in inner_of(one)["state"].values())
        and (MASTERS in one) == ("optimizer" in one)
    )


def _members(parameters: Sequence[Parameter], *, decayed: bool, experts: bool | None) -> list[Parameter]:
    """The parameters of a group: of all, or of experts, or of all else."""
    return [
        one
        for one in parameters
        if decays(one.name, one.held.shape) == decayed and experts in (None, ".experts." in one.name)
    ]


def _numbered(rank: Rank, frozen: frozenset[str]) -> Iterator[tuple[str, Placed]]:
    """Each kind of state of each parameter of a rank, whose file has the weights in their modules' order.

    Raises:
        CheckpointError: it has not a state for each.
    """
    parameters = _trained(rank, frozen)
    chain = _optimizers(rank)
    for place, one in enumerate(chain):
        experts = bool(place) if len(chain) > 1 else None
        for number, group in enumerate(inner_of(one)["param_groups"]):
            members = _members(parameters, decayed=group_decays(group), experts=experts)
            masters = dict(enumerate(one[MASTERS])).get(number, ()) if one.get(MASTERS) else None
            states = [inner_of(one)["state"].get(index, {}) for index in group["params"]]
            yield from _states(rank.path, number, members, states, masters)


def _states(
    path: Path,
    number: int,
    members: Sequence[Parameter],
    states: Sequence[Mapping[str, Any]],
    masters: Sequence[Stored] | None,
) -> Iterator[tuple[str, Placed]]:
    """Each kind of state of each parameter of a group."""
    if len(members) != len(states) or (masters is not None and len(members) != len(masters)):
        raise CheckpointError(
            f"{path}: group {number} of its optimizer has {len(states)} parameters"
            f"{'' if masters is None else f' and {len(masters)} masters'}, the model has {len(members)} such",
            hint="only whole parts of a LLaVA model may be frozen",
        )
    kinds: set[str] = set()
    for at, (name, held) in enumerate(members):
        found = {kind: state for kind, state in states[at].items() if kind != "step"}
        found |= {} if masters is None else {MASTER: masters[at]}
        kinds = kinds or {*found} & {*MOMENTS, MASTER}
        if {*found} != kinds or not all(isinstance(state, Stored) for state in found.values()):
            raise CheckpointError(
                f"{path}: the optimizer has {', '.join(sorted(found)) or 'nothing'} of {name}, "
                f"not {', '.join(sorted(kinds)) or 'what is converted'}"
            )
        for kind, stored in found.items():
            yield kind, Placed(f"{kind} of {name}", stored, held)


def to_classic(
    folder: Path,
    spec: Spec,
    grid: Grid,
    dtypes: Mapping[str, str],
    optimizer: Optimizer,
    *,
    ep: int = 1,
    chunks: int = 1,
) -> dict[str, list[Placed]]:
    """Make the files of a classic checkpoint with room for weights and optimizer; where each kind stands.

    They stand under the iteration's number: Megatron takes no optimizer from a release.

    Args:
        folder: where the checkpoint goes.
        spec: the model.
        grid: its grid.
        dtypes: torch's names of the weights' types, by Hugging Face's name.
        optimizer: what there is; masters of fp32 weights, which distributed optimizers have, are left out.
        ep: expert parallel ranks.
        chunks: chunks of each stage of an interleaved pipeline.
    """
    if set(dtypes.values()) == {"float32"}:
        others = {kind: model for kind, model in optimizer.states.items() if kind != MASTER}
        optimizer = replace(optimizer, states=others)
    rest = optimizer.rest
    args = checkpoint.megatron_args(replace(spec, dtype=dtypes[spec.norm]), grid)
    args.iteration = rest.iteration
    args.consumed_train_samples = (rest.schedule or {}).get("num_steps", 0)
    trees: list[Mapping[str, Any]] = []

    def more(parts: Mapping[str, Form]) -> Mapping[str, Any]:
        both = [_tree(parts, optimizer, experts=some) for some in ((False, True) if ep > 1 else (None,))]
        trees.append({"optimizer": both if ep > 1 else both[0], **progress(rest)})
        rooms: Mapping[str, Any] = rooms_for(trees[-1])
        return rooms

    place = folder / checkpoint.ITERATION.format(rest.iteration)
    ranks = checkpoint.lay_out_ranks(
        place, spec, grid, dtypes, args, ep=ep, chunks=chunks, order=module_order, more=more
    )
    placed: dict[str, list[Placed]] = {"": checkpoint.weights(ranks)}
    for rank, tree in zip(ranks, trees, strict=True):
        fill(tree, rank.content)
        for kind, one in _numbered(rank, rest.frozen):
            placed.setdefault(kind, []).append(one)
    return placed


def _tree(parts: Mapping[str, Form], optimizer: Optimizer, *, experts: bool | None) -> dict[str, Any]:
    """What a rank's file has of an optimizer, with room for the states of its parameters."""
    found = (Parameter(*one) for form in parts.values() for one in form.items())
    parameters = [one for one in found if one.name.partition(".")[0] not in optimizer.rest.frozen]
    state: dict[int, dict[str, Any]] = {}
    groups, masters = [], []
    step = {} if optimizer.rest.step is None else {"step": optimizer.rest.step}
    kept = optimizer.rest.groups
    for group in [of_experts(kept[0])] if experts else kept:
        members = _members(parameters, decayed=group_decays(group), experts=experts)
        first = len(state)
        rooms = [_rooms(one, optimizer.dtypes) for one in members]
        masters.append([one.pop(MASTER, None) for one in rooms])
        state |= {first + number: step | one for number, one in enumerate(rooms)}
        groups.append({**group, "params": list(range(first, first + len(members)))})
    tree = wrapped(optimizer, {"state": state, "param_groups": groups})
    return tree | ({MASTERS: masters} if MASTER in optimizer.states else {})


def _rooms(one: Parameter, dtypes: Mapping[str, Mapping[str, str]]) -> dict[str, Room]:
    return {
        kind: Room(type_of(one.name, one.held.pieces, types), one.held.shape)
        for kind, types in dtypes.items()
    }
