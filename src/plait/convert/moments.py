"""What an optimizer's state is: moments and fp32 masters of parameters, and what is no parameter's.

A moment, or a master, is made of the boxes that its parameter is made of. So each kind of state is a model of
the same shapes for :mod:`plait.convert.stream`, checked and moved as the weights are. Groups of parameters
with their count of steps, a loss scale and the schedule go along as they are. Names are Megatron Core's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plait.convert.ops import Shape
from plait.convert.stream import Model, Placed
from plait.convert.tables import entries
from plait.errors import CheckpointError
from plait.models.archive import Room
from plait.models.leaves import Leaf, root
from plait.models.specs import Spec
from plait.models.stored import Stored, write_from

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Adam's, and that of SGD."""
MASTER, MASTERS = "master", "fp32_from_fp16_params"
"""The fp32 weights of a run in another type: here, and in the classic layout."""
DISTRIBUTED = "param_state_sharding_type"
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
        frozen: parts of a LLaVA model that were not trained; they have no state.
    """

    iteration: int
    groups: Sequence[Mapping[str, Any]]
    step: Any = None
    scaler: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None
    distributed: bool = False
    frozen: frozenset[str] = frozenset()


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
        frozen = {"frozen": sorted(self.rest.frozen)} if self.rest.frozen else {}
        merkle = {kind: roots[kind] for kind in placed if kind}
        return {"iteration": self.rest.iteration, "merkle": merkle, **frozen}


def no_state(place: Path) -> CheckpointError:
    """There is no state."""
    return CheckpointError(
        f"{place} holds no optimizer's state", hint="leave --optim out, or give a checkpoint of training"
    )


def shapes_of(spec: Spec, frozen: frozenset[str]) -> dict[str, Shape]:
    """What has a state: all that Megatron computes with and trains."""
    trained = {name for entry in entries(spec) if entry.part not in frozen for name in entry.hf}
    return {name: shape for name, shape in spec.shapes.items() if name in trained}


def parts_of(spec: Spec) -> frozenset[str]:
    """The parts of a LLaVA model, which may be frozen; another has none."""
    return frozenset(entry.part for entry in entries(spec)) if spec.vision else frozenset()


def chain_of(where: Path, outer: Any) -> list[Mapping[str, Any]]:
    """The optimizer of all, or that of all but experts and that of experts.

    Raises:
        CheckpointError: it is neither.
    """
    both = outer if isinstance(outer, list) else [outer]
    if isinstance(outer, dict) and outer.keys() == {0, 1}:
        both = [outer[0], outer[1]]
    if len(both) > 2 or not all(map(_is_known, both)):
        raise unknown_form(where)
    return both


def unknown_form(where: Path) -> CheckpointError:
    """There is a state, and something else in it."""
    return CheckpointError(f"{where} has an optimizer of a form that is not converted")


def _is_known(one: Any) -> bool:
    """Whether it is an optimizer of torch's, or one with masters that holds such, and nothing else."""
    found = inner_of(one) if isinstance(one, dict) else None
    return (
        isinstance(found, dict)
        and found.keys() <= {"param_groups", "state"}
        and (found is one or one.keys() <= {"optimizer", "grad_scaler", MASTERS, DISTRIBUTED})
        and isinstance(found.get("param_groups"), list)
        and all(isinstance(group, dict) for group in found["param_groups"])
        and isinstance(found.get("state", {}), dict)
        and isinstance(one.get(MASTERS, []), list)
        and all(isinstance(group, list) for group in one.get(MASTERS, []))
    )


def inner_of(one: Mapping[str, Any]) -> Any:
    """Torch's optimizer within one that has masters."""
    return one.get("optimizer", one)


def in_order(where: Path, chain: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The group with weight decay and the one without; that of experts, if it is there, is as the former.

    Raises:
        CheckpointError: there are others.
    """
    first, *more = ([dict(group) for group in inner_of(one)["param_groups"]] for one in chain)
    for group in (*first, *(one for groups in more for one in groups)):
        group.pop("params", None)
    known = {group_decays(group): group for group in first}
    if len(first) != 2 or len(known) != 2 or any(groups != [of_experts(known[True])] for groups in more):
        raise CheckpointError(
            f"{where}: groups of its optimizer are not one with weight decay and one without",
            hint="learning rates of single parameters (decoupled_lr) are not converted",
        )
    return [known[True], known[False]]


def of_experts(group: Mapping[str, Any]) -> dict[str, Any]:
    """The same group of the experts' own optimizer."""
    return {**group, "is_expert_parallel": True}


def group_decays(group: Mapping[str, Any]) -> bool:
    """Whether it is the group with weight decay; NeMo has another name for its factor."""
    return bool(next((group[key] for key in ("wd_mult", "pre_wd_mult", "weight_decay") if key in group), 0))


def decays(name: str, shape: Shape) -> bool:
    """Whether a parameter has weight decay: vectors and biases have none."""
    return len(shape) > 1 and not name.endswith(".bias")


def module_order(name: str) -> tuple[int, ...]:
    """The place of a parameter among those of its rank, as Megatron Core's modules have it."""
    return tuple(int(part) if part.isdecimal() else CHILDREN.index(part) for part in name.split("."))


def wrapped(optimizer: Optimizer, inner: dict[str, Any]) -> dict[str, Any]:
    """An optimizer with masters holds one without."""
    if MASTER not in optimizer.states:
        return inner
    scaler = optimizer.rest.scaler
    return {"optimizer": inner, **({"grad_scaler": dict(scaler)} if scaler is not None else {})}


def progress(rest: Rest) -> dict[str, Any]:
    """What a checkpoint says of the run: the schedule and the iteration."""
    schedule = {} if rest.schedule is None else {"opt_param_scheduler": dict(rest.schedule)}
    return {**schedule, "iteration": rest.iteration}


# Small tensors among plain values, such as a loss scale


def values_of(tree: Any) -> Any:
    """Plain values that stand in a file, with its tensors read."""
    if isinstance(tree, dict):
        return {key: values_of(one) for key, one in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(values_of, tree))
    return tree.tensor() if isinstance(tree, Stored) else tree


def rooms_for(tree: Any) -> Any:
    """The same with room in place of tensors."""
    if isinstance(tree, dict):
        return {key: rooms_for(one) for key, one in tree.items()}
    if isinstance(tree, list):
        return [rooms_for(one) for one in tree]
    return Room(str(tree.dtype).rpartition(".")[2], tuple(tree.shape)) if torch.is_tensor(tree) else tree


def fill(tree: Any, there: Any) -> None:
    """Write the tensors of values to where the same have room in a file."""
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            fill(tree[key], there[key])
    elif torch.is_tensor(tree):
        with there.path.open("r+b") as file:
            content = tree.contiguous().reshape(-1).view(torch.uint8).numpy()
            write_from(file.fileno(), there.offset, content.data)
