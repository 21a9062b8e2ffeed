"""The optimizer's state beside a model's weights, from any layout and grid to any other.

A moment, or an fp32 master, is made of the boxes that its parameter is made of. So each kind of state is a
model of the same shapes for :mod:`plait.convert.stream`, checked and moved as the weights are. What is no
parameter's goes along as it is: groups of parameters with their count of steps, a loss scale, the schedule.

Names follow Megatron Core. In ``torch_dist`` a state's name stands before its parameter's. In the classic
layout states are numbered by the parameter's place: those with weight decay first, then vectors and biases,
both in the order of the model's modules. Experts have an optimizer of their own behind that of all else, in
the classic layout where they are dealt out only.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from plait.convert import checkpoint, torch_dist
from plait.convert.checkpoint import Rank
from plait.convert.forms import Form
from plait.convert.ops import Held, Shape
from plait.convert.stream import Leaf, Model, Placed, root, type_of
from plait.convert.tables import carried
from plait.convert.torch_dist import COMMON, METADATA, STATE, TorchDist
from plait.errors import CheckpointError
from plait.models.archive import Archive, Room
from plait.models.specs import Spec
from plait.models.stored import Stored, write_from
from plait.parallel.grid import Grid

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Adam's, and that of SGD."""
MASTER, PER_MASTER = "master", {False: "fp32_param", True: "param"}
"""The fp32 weights of a run in another type: here; and in torch_dist, by whether it is distributed."""
MASTERS, DISTRIBUTED = "fp32_from_fp16_params", "param_state_sharding_type"
RESHARDABLE = "fully_reshardable"
CHAINED, KIND = "chained_{}.", re.compile(r"^(?:chained_[01]\.)?optimizer\.state\.([^.]+)\.")
"""What stands before all else where experts have their own optimizer; and a kind of state in a name."""
CHILDREN = (
    "language_model", "vision_model", "vision_projection", "class_token", "conv1", "position_embeddings",
    "ln_pre", "embedding", "encoder", "decoder", "layers", "final_layernorm", "output_layer", "vision_patch",
    "input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp", "linear_proj", "linear_qkv",
    "q_layernorm", "k_layernorm", "router", "experts", "local_experts", "linear_fc1", "linear_fc2",
    "word_embeddings", "weight", "bias",
)  # fmt: skip
"""A module's children, in the order in which Megatron's classes make them."""


class Parameter(NamedTuple):
    """A parameter of a rank."""

    name: str
    held: Held


@dataclass(frozen=True)
class Rest:
    """What an optimizer's state has that is no parameter's.

    Attributes:
        iteration: after which it was saved.
        groups: what its groups of parameters have but the parameters; that with weight decay comes first.
        step: the count of steps where each parameter has it, as torch's own AdamW does; None where groups do.
        scaler: the loss scale.
        schedule: of learning rate and weight decay, and how far it is.
        distributed: whether a distributed optimizer's names are those of the states.
    """

    iteration: int
    groups: Sequence[Mapping[str, Any]]
    step: Any = None
    scaler: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None
    distributed: bool = False


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's state.

    Attributes:
        path: where it stands.
        states: each kind of it: ``exp_avg``, ``master`` and so on.
        rest: all else.
    """

    path: Path
    states: Mapping[str, Model]
    rest: Rest

    @property
    def dtypes(self) -> dict[str, Mapping[str, str]]:
        """The types of each kind of state, by Hugging Face's name."""
        return {kind: model.dtypes for kind, model in self.states.items()}

    def check(self, placed: Mapping[str, Sequence[Placed]]) -> None:
        """Check that targets take each element of each kind once; nothing is written.

        Raises:
            CheckpointError: they do not.
        """
        for kind, model in self.states.items():
            if kind in placed:
                model.check(placed[kind])

    def write(self, placed: Mapping[str, Sequence[Placed]], weights: Mapping[str, Leaf]) -> dict[str, Any]:
        """Write each kind where targets say; masters without one are read, and are the weights themselves.

        Args:
            placed: the targets of each kind.
            weights: the model's tensors.

        Returns:
            What a manifest says of the optimizer.

        Raises:
            CheckpointError: masters do not round to these weights; so it is where a parameter's state is
                taken for another's.
        """
        roots = {
            kind: root(model.stream(placed.get(kind, ()), rounded=weights if kind == MASTER else None))
            for kind, model in self.states.items()
        }
        return {"iteration": self.rest.iteration, "merkle": {kind: roots[kind] for kind in placed if kind}}


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
        raise _none(place)
    return _of_classic(place, spec)


def _none(place: Path) -> CheckpointError:
    return CheckpointError(
        f"{place} holds no optimizer's state", hint="leave --optim out, or give a checkpoint of training"
    )


def _shapes(spec: Spec) -> dict[str, Shape]:
    """What has a state: all that Megatron computes with."""
    absent = carried(spec)
    return {name: shape for name, shape in spec.shapes.items() if name not in absent}


def _chain(where: Path, outer: Any) -> list[Mapping[str, Any]]:
    """The optimizer of all, or that of all but experts and that of experts.

    Raises:
        CheckpointError: it is neither.
    """
    both = outer if isinstance(outer, list) else [outer]
    if isinstance(outer, dict) and outer.keys() == {0, 1}:
        both = [outer[0], outer[1]]
    known = all(isinstance(one, dict) and "param_groups" in _inner(one) for one in both)
    if not known or len(both) > 2:
        raise CheckpointError(f"{where} has an optimizer of a form that is not converted")
    return both


def _inner(one: Mapping[str, Any]) -> Any:
    """Torch's optimizer within one that has masters."""
    return one.get("optimizer", one)


def _in_order(where: Path, chain: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The group with weight decay and the one without; that of experts, if it is there, is as the former.

    Raises:
        CheckpointError: there are others.
    """
    first, *more = ([dict(group) for group in _inner(one)["param_groups"]] for one in chain)
    for group in (*first, *(one for groups in more for one in groups)):
        group.pop("params", None)
    known = {_decays_group(group): group for group in first}
    if len(first) != 2 or len(known) != 2 or any(groups != [_of_experts(known[True])] for groups in more):
        raise CheckpointError(
            f"{where}: groups of its optimizer are not one with weight decay and one without",
            hint="learning rates of single parameters (decoupled_lr) are not converted",
        )
    return [known[True], known[False]]


def _of_experts(group: Mapping[str, Any]) -> dict[str, Any]:
    return {**group, "is_expert_parallel": True}


def _decays_group(group: Mapping[str, Any]) -> bool:
    return bool(group.get("wd_mult", group.get("weight_decay")))


def decays(name: str, shape: Shape) -> bool:
    """Whether a parameter has weight decay: vectors and biases have none."""
    return len(shape) > 1 and not name.endswith(".bias")


def module_order(name: str) -> tuple[int, ...]:
    """The place of a parameter among those of its rank, as Megatron Core's modules have it."""
    return tuple(int(part) if part.isdecimal() else CHILDREN.index(part) for part in name.split("."))


# torch_dist


def _of_torch_dist(folder: Path, spec: Spec) -> Optimizer:
    common = _values(Archive(folder / COMMON).content) if (folder / COMMON).is_file() else {}
    names = TorchDist(folder).shapes
    kinds = {found[1] for found in map(KIND.search, names) if found}
    if not common.get("optimizer") or "iteration" not in common or not kinds:
        raise _none(folder)
    chain = _chain(folder / COMMON, common["optimizer"])
    form = chain[0].get(DISTRIBUTED)
    if form not in (None, RESHARDABLE) or any("optimizer.distributed." in name for name in names):
        raise CheckpointError(
            f"{folder} has the state of a distributed optimizer as {form or 'its buckets'}",
            hint=f"{RESHARDABLE} is what is read: Megatron-LM has --dist-ckpt-optim-fully-reshardable",
        )
    master = PER_MASTER[form is not None]
    if kinds - {*MOMENTS, master}:
        raise CheckpointError(
            f"{folder} has the optimizer's {min(kinds - {*MOMENTS, master})}, which is not converted"
        )
    before = CHAINED if any(name.startswith(CHAINED.format(0)) for name in names) else ""
    shapes = _shapes(spec)
    states = {
        MASTER if kind == master else kind: Model(
            torch_dist.sources(folder, spec, before + STATE.format(kind)), shapes
        )
        for kind in sorted(kinds)
    }
    rest = Rest(
        iteration=common["iteration"],
        groups=_in_order(folder, chain),
        step=_inner(chain[0]).get("state", {}).get("common_step"),
        scaler=chain[0].get("grad_scaler"),
        schedule=common.get("opt_param_scheduler"),
        distributed=form is not None,
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
        _wrapped(optimizer, {"param_groups": groups, **step}) | form
        for groups in (all_else, [_of_experts(all_else[0])])
    ]
    common = {"optimizer": dict(enumerate(both)) if spec.num_experts else both[0], **_progress(rest)}
    placed = torch_dist.lay_out(folder, spec, {"": dtypes, **types}, common)
    return {"": placed[""], **{kind: placed[prefix] for kind, prefix in prefixes.items()}}


def _wrapped(optimizer: Optimizer, inner: dict[str, Any]) -> dict[str, Any]:
    """An optimizer with masters holds one without."""
    if MASTER not in optimizer.states:
        return inner
    scaler = optimizer.rest.scaler
    return {"optimizer": inner, **({"grad_scaler": dict(scaler)} if scaler is not None else {})}


def _progress(rest: Rest) -> dict[str, Any]:
    schedule = {} if rest.schedule is None else {"opt_param_scheduler": dict(rest.schedule)}
    return {**schedule, "iteration": rest.iteration}


# Classic


def _of_classic(folder: Path, spec: Spec) -> Optimizer:
    placed: dict[str, list[Placed]] = {}
    rests, steps = [], set()
    for rank in checkpoint.ranks(folder, spec):
        rests.append(_rest(rank))
        for kind, one in _numbered(rank):
            placed.setdefault(kind, []).append(one)
        steps |= _steps(rank)
        if len(steps) > 1:
            raise CheckpointError(
                f"{rank.path}: its optimizer has made {' and '.join(f'{n:g}' for n in sorted(steps))} steps",
                hint="the files are of different checkpoints",
            )
    shapes = _shapes(spec)
    return Optimizer(folder, {kind: Model(some, shapes) for kind, some in sorted(placed.items())}, rests[0])


def _rest(rank: Rank) -> Rest:
    """What a rank's file has of the optimizer that is no parameter's."""
    chain = _chain_of(rank)
    return Rest(
        iteration=rank.content["iteration"],
        groups=_in_order(
            rank.path, _values([{"param_groups": _inner(one)["param_groups"]} for one in chain])
        ),
        step=next(_values(state.get("step")) for state in _inner(chain[0])["state"].values()),
        scaler=_values(chain[0].get("grad_scaler")),
        schedule=_values(rank.content.get("opt_param_scheduler")),
    )


def _steps(rank: Rank) -> set[float]:
    """How many steps a rank's optimizer has made, by all that count them."""
    inner = [_inner(one) for one in _chain_of(rank)]
    counts = [
        _values(one.get("step")) for some in inner for one in (*some["param_groups"], *some["state"].values())
    ]
    return {float(count) for count in counts if count is not None}


def _chain_of(rank: Rank) -> list[Mapping[str, Any]]:
    """The optimizers of a rank's file.

    Raises:
        CheckpointError: it has none, or one that is not read.
    """
    outer = rank.content.get("optimizer")
    if not outer:
        raise _none(rank.path)
    if rank.is_old:
        raise CheckpointError(f"{rank.path} has an optimizer of a form that is not converted")
    found = _chain(rank.path, outer)
    if not all("state" in _inner(one) for one in found):
        raise CheckpointError(
            f"{rank.path} has no moments: those of a distributed optimizer stand beside, by its buckets",
            hint="that form is not converted: save it by --ckpt-format torch_dist",
        )
    if not _inner(found[0])["state"]:
        raise _none(rank.path)
    return found


def _members(parameters: Sequence[Parameter], *, decayed: bool, experts: bool | None) -> list[Parameter]:
    """The parameters of a group: of all, or of experts, or of all else."""
    return [
        one
        for one in parameters
        if decays(one.name, one.held.shape) == decayed and experts in (None, ".experts." in one.name)
    ]


def _numbered(rank: Rank) -> Iterator[tuple[str, Placed]]:
    """Each kind of state of each parameter of a rank, whose file has the weights in their modules' order.

    Raises:
        CheckpointError: it has not a state for each.
    """
    parameters = [Parameter(one.name, one.held) for part in rank.parts.values() for one in part]
    chain = _chain_of(rank)
    for place, one in enumerate(chain):
        experts = bool(place) if len(chain) > 1 else None
        for number, group in enumerate(_inner(one)["param_groups"]):
            members = _members(parameters, decayed=_decays_group(group), experts=experts)
            masters = dict(enumerate(one[MASTERS])).get(number, ()) if one.get(MASTERS) else None
            states = [_inner(one)["state"].get(index, {}) for index in group["params"]]
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
            hint="a frozen parameter has no state, and such an optimizer is not converted",
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
        trees.append({"optimizer": both if ep > 1 else both[0], **_progress(rest)})
        rooms: Mapping[str, Any] = _rooms(trees[-1])
        return rooms

    place = folder / checkpoint.ITERATION.format(rest.iteration)
    ranks = checkpoint.lay_out_ranks(
        place, spec, grid, dtypes, args, ep=ep, chunks=chunks, order=module_order, more=more
    )
    placed: dict[str, list[Placed]] = {"": checkpoint.weights(ranks)}
    for rank, tree in zip(ranks, trees, strict=True):
        _fill(tree, rank.content)
        for kind, one in _numbered(rank):
            placed.setdefault(kind, []).append(one)
    return placed


def _tree(parts: Mapping[str, Form], optimizer: Optimizer, *, experts: bool | None) -> dict[str, Any]:
    """What a rank's file has of an optimizer, with room for the states of its parameters."""
    parameters = [Parameter(*one) for form in parts.values() for one in form.items()]
    state: dict[int, dict[str, Any]] = {}
    groups, masters = [], []
    step = {} if optimizer.rest.step is None else {"step": optimizer.rest.step}
    kept = optimizer.rest.groups
    for group in [_of_experts(kept[0])] if experts else kept:
        members = _members(parameters, decayed=_decays_group(group), experts=experts)
        first = len(state)
        rooms = [_rooms_of(one, optimizer.dtypes) for one in members]
        masters.append([one.pop(MASTER, None) for one in rooms])
        state |= {first + number: step | one for number, one in enumerate(rooms)}
        groups.append({**group, "params": list(range(first, first + len(members)))})
    wrapped = _wrapped(optimizer, {"state": state, "param_groups": groups})
    return wrapped | ({MASTERS: masters} if MASTER in optimizer.states else {})


def _rooms_of(one: Parameter, dtypes: Mapping[str, Mapping[str, str]]) -> dict[str, Room]:
    return {
        kind: Room(type_of(one.name, one.held.pieces, types), one.held.shape)
        for kind, types in dtypes.items()
    }


# Small tensors among plain values, such as a loss scale


def _values(tree: Any) -> Any:
    """Plain values that stand in a file, with its tensors read."""
    if isinstance(tree, dict):
        return {key: _values(one) for key, one in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(_values, tree))
    return tree.tensor() if isinstance(tree, Stored) else tree


def _rooms(tree: Any) -> Any:
    """The same with room in place of tensors."""
    if isinstance(tree, dict):
        return {key: _rooms(one) for key, one in tree.items()}
    if isinstance(tree, list):
        return [_rooms(one) for one in tree]
    return Room(str(tree.dtype).rpartition(".")[2], tuple(tree.shape)) if torch.is_tensor(tree) else tree


def _fill(tree: Any, there: Any) -> None:
    """Write the tensors of values to where the same have room in a file."""
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            _fill(tree[key], there[key])
    elif torch.is_tensor(tree):
        with there.path.open("r+b") as file:
            content = tree.contiguous().reshape(-1).view(torch.uint8).numpy()
            write_from(file.fileno(), there.offset, content.data)
