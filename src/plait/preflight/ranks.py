"""Every rank of a run on the meta device, by the code that training builds it with; nothing is allocated."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from plait.config.run import without_engine
from plait.convert import engine
from plait.convert.forms import Place, of_rank
from plait.convert.tables import carried
from plait.errors import CheckpointError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.tokens.vocabulary import padded_vocab_size
from plait.train.build import DTYPES, build_chunks, freeze
from plait.train.world import alone

EXPERTS = ".experts."
"""Within the names of the parameters that experts have."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rank:
    """The parameters that a rank of Megatron's grid has in a chunk of its layers, in the order of its model.

    Attributes:
        tp: its place among those that share a layer.
        pp: its stage.
        ep: its place among those that share the experts of a layer.
        shapes: shape by name.
        frozen: names of those that are not trained.
        chunk: the chunk's number, 0 where a stage is not cut into several.
    """

    tp: int
    pp: int
    shapes: Shapes
    frozen: frozenset[str] = frozenset()
    ep: int = 0
    chunk: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """Which rank it is."""
        return self.tp, self.pp, self.ep

    def stage(self, grid: Grid) -> int:
        """The chunk's stage in the grid whose stages are the chunks of this one's."""
        return self.chunk * grid.pp + self.pp

    def trained(self, *, experts: bool = False) -> list[int]:
        """Elements of each trained parameter that is an expert's, or is none."""
        return [
            math.prod(shape)
            for name, shape in self.shapes.items()
            if name not in self.frozen and (EXPERTS in name) == experts
        ]

    @property
    def kept(self) -> int:
        """Elements of all frozen ones."""
        return sum(math.prod(self.shapes[name]) for name in self.frozen)


def ranks_of(
    spec: Spec, grid: Grid, *, dtype: torch.dtype, run: Mapping[str, Any] | None = None
) -> Iterator[Rank]:
    """Build each chunk of each rank of a grid; copies of data parallelism are equal, so there is one of them.

    No process is started: every rank takes this one's place in a group that talks to nobody. Layers are
    Megatron Core's own: Transformer Engine's have the same parameters, and are not made on the meta device.

    Args:
        spec: the model.
        grid: the grid.
        dtype: type of the weights.
        run: the run's settings; without them nothing is shared and nothing frozen.
    """
    settings = without_engine(run) if run else {}
    cp, ep = (int(settings.get(f"{axis}_parallel_size", 1)) for axis in ("context", "expert_model"))
    chunks = settings.get("virtual_pipeline_model_parallel_size")
    for (number, (tp, pp)), expert in product(enumerate(grid), range(ep)):
        place = alone(number, grid.tp, grid.pp, cp=cp, chunks=chunks, ep=ep, expert=expert)
        with place, torch.device("meta"):
            models = build_chunks(spec, grid, dtype=dtype, run=settings)
        freeze(models, settings.get("freeze", ()))
        for chunk, model in enumerate(models):
            found = dict(model.named_parameters())
            assert {one.device.type for one in found.values()} == {"meta"}
            frozen = frozenset(name for name, one in found.items() if not one.requires_grad)
            shapes = {name: tuple(one.shape) for name, one in found.items()}
            yield Rank(tp, pp, shapes, frozen, expert, chunk)


def checked(spec: Spec, grid: Grid, run: Mapping[str, Any]) -> list[Rank]:
    """Every rank of a run: it has what `plait shard` cuts for it, and all together have the model, once.

    Raises:
        CheckpointError: a name or a shape differs, or elements are lost or doubled.
        ConfigError: the model cannot be cut for this grid.
    """
    found, ep = [], int(run.get("expert_model_parallel_size", 1))
    cut = grid.interleaved(run.get("virtual_pipeline_model_parallel_size") or 1)
    for rank in ranks_of(spec, grid, dtype=DTYPES[run["params_dtype"]], run=run):
        _check_shapes(rank, _cut(spec, cut, replace(rank, pp=rank.stage(grid)), ep))
        found.append(rank)
    _check_sum(spec, cut, [replace(rank, pp=rank.stage(grid)) for rank in found])
    return found


def _cut(spec: Spec, grid: Grid, rank: Rank, ep: int) -> Shapes:
    """What is cut for a stage of a rank, with its own experts only."""
    shapes = engine.rank_shapes(spec, grid, rank.tp, rank.pp)
    if not spec.num_experts:
        return shapes
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    own = engine.own_experts(state, spec=spec, grid=grid, pp_rank=rank.pp, ep_rank=rank.ep, ep=ep)
    return {name: tuple(tensor.shape) for name, tensor in own.items()}


def _check_shapes(rank: Rank, cut: Shapes) -> None:
    """A rank's model has the tensors that are cut for it, and no others."""
    for name in [*cut, *rank.shapes]:
        ours, theirs = rank.shapes.get(name, "none"), cut.get(name, "none")
        if ours != theirs:
            raise CheckpointError(
                f"rank tp {rank.tp}, pp {rank.pp}: Megatron Core's model has {name} {ours}, and what is cut "
                f"for it has {theirs}",
                hint="this is a bug of the tables in convert/tables.py, or megatron-core has changed",
            )


def _check_sum(spec: Spec, grid: Grid, ranks: Sequence[Rank]) -> None:
    """All ranks hold the model once: copies count once, padding rows and carried tensors not at all."""
    forms = {rank: of_rank(spec, grid, Place(*rank)) for rank in grid}
    held = sum(
        math.prod(shape)
        for rank in ranks
        for name, shape in rank.shapes.items()
        if not forms[rank.tp, rank.pp][name].copy and (rank.ep == 0 or EXPERTS in name)
    )
    padding = (
        (1 if spec.tied else 2)
        * spec.hidden_size
        * (padded_vocab_size(spec.vocab_size, grid.tp) - spec.vocab_size)
    )
    expected = parameters(spec) - sum(map(math.prod, carried(spec).values()))
    if held - padding != expected:
        raise CheckpointError(
            f"the ranks of the {grid} hold {held - padding} elements, what is trained of the model {expected}"
        )


def parameters(spec: Spec) -> int:
    """Elements of the whole model, as transformers counts them."""
    return sum(map(math.prod, spec.shapes.values()))
