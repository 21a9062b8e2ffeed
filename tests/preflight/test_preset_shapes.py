"""Each rank of each preset on the meta device: Megatron Core's model has the parameters cut for it."""

import math
from dataclasses import replace

import pytest
import torch
from hub_configs import PLANS

from plait.convert import engine
from plait.convert.tables import carried
from plait.errors import CheckpointError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.preflight import memory, ranks
from plait.preflight.launched import planned as first_job
from plait.preflight.shape import config_of_run

PARAMETERS = {
    "solo-mistral-7b": 7_241_732_096 + 2 * 1031 * 4096 + 3072 * 4096,
    "codeact-mistral-7b": 7_241_732_096 + 2 * 2 * 4096,
    "codeact-llama2-7b": 6_738_415_616 + 2 * 2 * 4096,
    "llava-mistral-7b": 7_248_023_552 + 2 * 2 * 4096 + 303_507_456 + 14336 * (1024 + 4096),
    "llava-jp-13b": 13_707_924_480 + 2 * 2 * 5120 + 428_225_600 + 1153 * 5120 + 5121 * 5120,
}
"""Published numbers of the parts, and what is added to them."""


def first_spec(plan):
    run = next(iter(plan.config.runs))
    return Spec.from_config(config_of_run(plan, run))


@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.yaml")))
def test_every_rank_of_a_preset_has_the_parameters_that_are_cut_for_it(name, planned):
    plan = planned(name)
    for run in plan.config.runs:
        job, spec = first_job(plan, run), Spec.from_config(config_of_run(plan, run))
        found = ranks.checked(spec, job.grid, job.settings)
        shape = memory.Run(
            job.settings, job.grid, job.settings["data_parallel_size"], sequence=plan.sequence(run)
        )
        _, needed = memory.worst(found, spec, shape)

        assert [(rank.tp, rank.pp) for rank in found] == list(job.grid)
        again = spec.vocab_size * spec.hidden_size if spec.tied and job.grid.pp > 1 else 0
        weights = 2 * (ranks.parameters(spec) + again) / len(job.grid)
        assert 0.9 * weights < needed["weights"] < 1.2 * weights
        assert set(job.settings["freeze"]) == {one.partition(".")[0] for rank in found for one in rank.frozen}


@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(8, 1), Grid(1, 4), Grid(4, 2, first=15)], ids=str)
@pytest.mark.parametrize("name", ["solo-mistral-7b", "llava-mistral-7b"])
def test_every_rank_of_other_grids_too(name, grid, planned):
    spec = first_spec(planned(name))
    for rank in ranks.ranks_of(spec, grid, dtype=torch.bfloat16):
        assert rank.shapes == engine.rank_shapes(spec, grid, rank.tp, rank.pp)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_as_many_parameters_as_its_published_parts(name, planned):
    spec = first_spec(planned(name))
    assert ranks.parameters(spec) == PARAMETERS[name]
    below = sum(math.prod(shape) for shape in engine.rank_shapes(spec, Grid()).values())
    padding = 2 * spec.hidden_size * (-spec.vocab_size % 128)
    left = sum(math.prod(shape) for shape in carried(spec).values())
    assert below == PARAMETERS[name] - left + padding


@pytest.fixture
def two(planned):
    """The ranks of a preset on TP 2, and its shape."""
    spec, grid = first_spec(planned("codeact-llama2-7b")), Grid(2, 1)
    return spec, grid, list(ranks.ranks_of(spec, grid, dtype=torch.bfloat16))


def test_a_parameter_of_another_shape_is_named(two):
    spec, grid, (rank, _) = two
    cut = engine.rank_shapes(spec, grid)
    for name, shape in [("embedding.word_embeddings.weight", (5, 5)), ("more.weight", (1,))]:
        with pytest.raises(CheckpointError, match=rf"rank tp 0, pp 0: .* has {name}"):
            ranks._check_shapes(replace(rank, shapes={**rank.shapes, name: shape}), cut)
    with pytest.raises(CheckpointError, match=r"decoder.final_layernorm.weight none"):
        ranks._check_shapes(
            replace(rank, shapes={k: v for k, v in rank.shapes.items() if "final" not in k}), cut
        )


def test_elements_that_no_rank_holds_are_missed(two):
    spec, grid, (first, second) = two
    ranks._check_sum(spec, grid, [first, second])
    with pytest.raises(CheckpointError, match=r"hold .* elements"):
        ranks._check_sum(spec, grid, [first])
    fewer = {k: v for k, v in second.shapes.items() if "linear_qkv" not in k}
    with pytest.raises(CheckpointError, match=r"hold .* elements"):
        ranks._check_sum(spec, grid, [first, replace(second, shapes=fewer)])
