"""What a run saves and loads, by Megatron's dist_checkpointing.

Model, optimizer and schedule are stored by global tensors, so another grid can read them. The
generators' states belong to ranks; a job of other ranks starts its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from plait.convert.torch_dist import EXTRA, TorchDist
from plait.train import build

log = logging.getLogger(__name__)

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""How a distributed optimizer's state is stored: whole, so that any grid can read it."""

RATES = {"lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "betas", "eps", "momentum"}
"""What a group of an optimizer's parameters has of the run's keys."""


@dataclass
class TrainState:
    """What a checkpoint holds, live; ``model`` are this rank's chunks of it."""

    model: Sequence[Any]
    optimizer: Any
    schedule: Any
    iteration: int = 0

    def sharded(self, *, is_loading: bool, generators: bool = True, optimizer: bool = True) -> dict[str, Any]:
        """The state by global tensors, as dist_checkpointing wants it; generators are each rank's own."""
        model = tensors(self.model)
        moments = (
            self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=SHARDING)
            if optimizer
            else None
        )
        return {
            **model,
            **({"optimizer": moments} if optimizer else {}),
            "opt_param_scheduler": self.schedule.state_dict(),
            **({"rng_state": _generators()} if generators else {}),
            "iteration": self.iteration,
        }

    def load(self, folder: Path, *, generators: bool = True, optimizer: bool = True) -> None:
        """Take everything from a checkpoint; what the run's keys say of its optimizer stays.

        Args:
            folder: the checkpoint.
            generators: take their states; only of a checkpoint of as many ranks.
            optimizer: take its state; without it the optimizer begins anew.
        """
        wanted = self.sharded(is_loading=True, generators=generators, optimizer=optimizer)
        found = dist_checkpointing.load(_held(wanted, folder), str(folder))
        load_weights(self.model, found)
        if optimizer:
            self._load_optimizer(found["optimizer"])
        else:
            self.optimizer.reload_model_params()
        self.schedule.load_state_dict(found["opt_param_scheduler"])
        if generators:
            _draw_on(found["rng_state"])
        self.iteration = found["iteration"]

    def _load_optimizer(self, found: Any) -> None:
        """The moments and the count of steps; a run that goes on where another stopped has its own rates.

        A stage whose parts are all frozen has none.
        """
        if not any(group["params"] for group in self.optimizer.param_groups):
            return
        own = [{key: group[key] for key in RATES & group.keys()} for group in self.optimizer.param_groups]
        with torch.no_grad():
            self.optimizer.load_state_dict(found)
        for group, rates in zip(self.optimizer.param_groups, own, strict=True):
            group.update(rates)


def tensors(chunks: Sequence[Any]) -> dict[str, Any]:
    """This rank's model by global tensors; before a name, which other chunks have too, its chunk's number."""
    return {
        f"{number}.{name}": tensor
        for number, chunk in enumerate(chunks)
        for name, tensor in chunk.sharded_state_dict().items()
    }


def load_weights(chunks: Sequence[Any], found: Mapping[str, Any]) -> None:
    """Take a model's own tensors out of what ``dist_checkpointing.load`` gave; none may lack."""
    for number, chunk in enumerate(chunks):
        start = f"{number}."
        own = {name.removeprefix(start): one for name, one in found.items() if name.startswith(start)}
        build.load_weights(chunk, own)


def load_model(chunks: Sequence[Any], folder: Path, *, whole: bool = True) -> None:
    """Load the weights, and nothing else, of a checkpoint of any grid.

    ``whole`` says that the ranks together load all of it, which Megatron then checks.
    """
    wanted = {name: one for name, one in tensors(chunks).items() if EXTRA not in name}
    load_weights(chunks, dist_checkpointing.load(wanted, str(folder), validate_access_integrity=whole))


def _held(wanted: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is wanted of a checkpoint, but for what Transformer Engine's layers remember and it has not.

    Megatron Core's own layers remember nothing, but most of them leave an empty entry.
    """
    stored = TorchDist(folder).metadata.entries
    return {name: one for name, one in wanted.items() if EXTRA not in name or one.unique_key in stored}


def _generators() -> ShardedObject:
    """The states of this rank's generators, stored by its place: copies draw alike only for equal lengths."""
    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["device"] = torch.cuda.get_rng_state()
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng_state", state, sizes, place)


def _draw_on(states: Mapping[str, Any]) -> None:
    """Take the states of this rank's generators, unless those of a GPU are not these."""
    gpu = torch.cuda.is_available()
    if ("device" in states) != gpu:
        log.warning("generators begin anew: the checkpoint was trained with %s GPU", "no" if gpu else "a")
        return
    torch.set_rng_state(states["torch"])
    if gpu:
        torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def first_of_copy() -> bool:
    """Whether this rank speaks for its copy of the model: all its ranks read the same samples."""
    places = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    return places == (0, 0, 0)
