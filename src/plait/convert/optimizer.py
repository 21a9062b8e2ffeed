"""The optimizer's state beside a model's weights, from any layout and grid to any other.

A moment, or an fp32 master, is made of the boxes that its parameter is made of. So each kind of state is a
model of the same shapes for :mod:`plait.convert.stream`, checked and moved as the weights are. What is no
parameter's goes along as it is: groups of parameters with their count of steps, a loss scale, the schedule.

Names follow Megatron Core. In ``torch_dist`` a state's name stands before its parameter's. In the classic
layout states are numbered by the parameter's place: those with weight decay first, then vectors and biases,
both in the order of the model's modules.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
CHILDREN = (
    "language_model", "vision_model", "vision_projection", "class_token", "conv1", "position_embeddings",
    "ln_pre", "embedding", "encoder", "decoder", "layers", "final_layernorm", "output_layer", "vision_patch",
    "input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp", "linear_proj", "linear_qkv",
    "q_layernorm", "k_layernorm", "router", "experts", "local_experts", "linear_fc1", "linear_fc2",
    "word_embeddings", "weight", "bias",
)  # fmt: skip
"""A module's children, in the order in which Megatron's classes make them."""


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
    if spec.num_experts:
        raise CheckpointError(
            f"{place} is of a mixture of experts, which have an optimizer of their own",
            hint="only optimizers of dense models are converted: leave --optim out",
        )
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


def _in_order(path: Path, groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The group with weight decay and the one without.

    Raises:
        CheckpointError: there are others.
    """
    known = {_decays_group(group): {k: v for k, v in group.items() if k != "params"} for group in groups}
    if len(groups) != 2 or len(known) != 2:
        raise CheckpointError(
            f"{path}: groups of its optimizer are {len(groups)}, not one with weight decay and one without",
            hint="learning rates of single parameters (decoupled_lr) are not converted",
        )
    return [known[True], known[False]]


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
    outer = common.get("optimizer")
    names = TorchDist(folder).shapes
    kinds = {name.split(".")[2] for name in names if name.startswith("optimizer.state.")}
    form = outer.get(DISTRIBUTED) if isinstance(outer, dict) else None
    if form not in (None, RESHARDABLE) or any(name.startswith("optimizer.distributed.") for name in names):
        raise CheckpointError(
            f"{folder} has the state of a distributed optimizer as {form or 'its buckets'}",
            hint=f"{RESHARDABLE} is what is read: Megatron-LM has --dist-ckpt-optim-fully-reshardable",
        )
    if not isinstance(outer, dict) or not kinds:
        raise _none(folder)
    master = PER_MASTER[form is not None]
    if kinds - {*MOMENTS, master}:
        raise CheckpointError(
            f"{folder} has the optimizer's {min(kinds - {*MOMENTS, master})}, which is not converted"
        )
    inner = outer.get("optimizer", outer)
    if not isinstance(inner.get("param_groups"), list) or not isinstance(common.get("iteration"), int):
        raise CheckpointError(f"{folder / COMMON} has an optimizer of a form that is not converted")
    shapes = _shapes(spec)
    states = {
        MASTER if kind == master else kind: Model(
            torch_dist.sources(folder, spec, STATE.format(kind)), shapes
        )
        for kind in sorted(kinds)
    }
    rest = Rest(
        iteration=common["iteration"],
        groups=_in_order(folder, inner["param_groups"]),
        step=inner.get("state", {}).get("common_step"),
        scaler=outer.get("grad_scaler"),
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
    rest = optimizer.rest
    prefixes = {
        kind: STATE.format(PER_MASTER[rest.distributed] if kind == MASTER else kind)
        for kind in optimizer.states
    }
    types = {prefixes[kind]: known for kind, known in optimizer.dtypes.items()}
    inner: dict[str, Any] = {"param_groups": [dict(group) for group in rest.groups]}
    if rest.step is not None:
        inner["state"] = {"common_step": rest.step}
    form = {DISTRIBUTED: RESHARDABLE} if rest.distributed else {}
    common = {"optimizer": _wrapped(optimizer, inner) | form, **_progress(rest)}
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
    inner, _ = _inner(rank)
    return Rest(
        iteration=rank.content["iteration"],
        groups=_in_order(rank.path, _values(inner["param_groups"])),
        step=next(_values(state.get("step")) for state in inner["state"].values()),
        scaler=_values(rank.content["optimizer"].get("grad_scaler")),
        schedule=_values(rank.content.get("opt_param_scheduler")),
    )


def _steps(rank: Rank) -> set[float]:
    """How many steps a rank's optimizer has made, by all that count them."""
    inner, _ = _inner(rank)
    counts = [_values(one.get("step")) for one in (*inner["param_groups"], *inner["state"].values())]
    return {float(count) for count in counts if count is not None}


def _inner(rank: Rank) -> tuple[Mapping[str, Any], Sequence[Sequence[Stored]]]:
    """The optimizer of a rank's file, and its masters by group.

    Raises:
        CheckpointError: it has none, or one that is not read.
    """
    outer = rank.content.get("optimizer")
    if not outer:
        raise _none(rank.path)
    inner = outer.get("optimizer", outer) if isinstance(outer, dict) else {}
    if rank.is_old or "param_groups" not in inner:
        raise CheckpointError(f"{rank.path} has an optimizer of a form that is not converted")
    if "state" not in inner:
        raise CheckpointError(
            f"{rank.path} has no moments: those of a distributed optimizer stand beside, by its buckets",
            hint="that form is not converted: save it by --ckpt-format torch_dist",
        )
    if not inner["state"]:
        raise _none(rank.path)
    return inner, outer.get(MASTERS, ())


def _numbered(rank: Rank) -> Iterator[tuple[str, Placed]]:
    """Each kind of state of each parameter of a rank, whose file has the weights in their modules' order.

    Raises:
        CheckpointError: it has not a state for each.
    """
    parameters = [one for part in rank.parts.values() for one in part]
    inner, masters = _inner(rank)
    kinds: set[str] = set()
    for number, group in enumerate(inner["param_groups"]):
        members = [one for one in parameters if decays(one.name, one.held.shape) == _decays_group(group)]
        copies = masters[number] if number < len(masters) else ()
        if len(members) != len(group["params"]) or (masters and len(members) != len(copies)):
            raise CheckpointError(
                f"{rank.path}: group {number} of its optimizer has {len(group['params'])} parameters"
                f"{f' and {len(copies)} masters' if masters else ''}, the model has {len(members)} such",
                hint="a frozen parameter has no state, and such an optimizer is not converted",
            )
        for at, (index, one) in enumerate(zip(group["params"], members, strict=True)):
            states = {kind: state for kind, state in inner["state"].get(index, {}).items() if kind != "step"}
            states |= {MASTER: copies[at]} if masters else {}
            kinds = kinds or {*states} & {*MOMENTS, MASTER}
            if {*states} != kinds or not all(isinstance(state, Stored) for state in states.values()):
                raise CheckpointError(
                    f"{rank.path}: the optimizer has {', '.join(sorted(states)) or 'nothing'} of {one.name}, "
                    f"not {', '.join(sorted(kinds)) or 'what is converted'}"
                )
            for kind, stored in states.items():
                yield kind, Placed(f"{kind} of {one.name}", stored, one.held)


def to_classic(
    folder: Path,
    spec: Spec,
    grid: Grid,
    dtypes: Mapping[str, str],
    optimizer: Optimizer,
    *,
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
        trees.append({"optimizer": _tree(parts, optimizer), **_progress(rest)})
        rooms: Mapping[str, Any] = _rooms(trees[-1])
        return rooms

    place = folder / checkpoint.ITERATION.format(rest.iteration)
    ranks = checkpoint.lay_out_ranks(
        place, spec, grid, dtypes, args, chunks=chunks, order=module_order, more=more
    )
    placed: dict[str, list[Placed]] = {"": checkpoint.weights(ranks)}
    for rank, tree in zip(ranks, trees, strict=True):
        _fill(tree, rank.content)
        for kind, one in _numbered(rank):
            placed.setdefault(kind, []).append(one)
    return placed


def _tree(parts: Mapping[str, Form], optimizer: Optimizer) -> dict[str, Any]:
    """What a rank's file has of the optimizer, with room for the states of its parameters."""
    parameters = [one for form in parts.values() for one in form.items()]
    state: dict[int, dict[str, Any]] = {}
    groups, masters = [], []
    step = {} if optimizer.rest.step is None else {"step": optimizer.rest.step}
    for group in optimizer.rest.groups:
        members = [one for one in parameters if decays(one[0], one[1].shape) == _decays_group(group)]
        first = len(state)
        rooms = [_rooms_of(*one, optimizer.dtypes) for one in members]
        masters.append([one.pop(MASTER, None) for one in rooms])
        state |= {first + number: step | one for number, one in enumerate(rooms)}
        groups.append({**group, "params": list(range(first, first + len(members)))})
    wrapped = _wrapped(optimizer, {"state": state, "param_groups": groups})
    return wrapped | ({MASTERS: masters} if MASTER in optimizer.states else {})


def _rooms_of(name: str, held: Held, dtypes: Mapping[str, Mapping[str, str]]) -> dict[str, Room]:
    return {kind: Room(type_of(name, held.pieces, types), held.shape) for kind, types in dtypes.items()}


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
