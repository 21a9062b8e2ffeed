"""Every way to spread a run gives the losses, gradients and weights of the plain loop, or is refused."""

import json

import numpy as np
import pytest
import torch
from test_loop import STEPS, model, plain, train_rank  # noqa: F401 - two are fixtures

from plait.convert import engine
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WAYS = {
    "recompute attention": (Grid(), {}, {"recompute_granularity": "selective"}),
    "recompute layers": (Grid(), {}, FULL),
    "recompute a block of stages": (Grid(1, 2), {}, {**FULL, "recompute_method": "block"}),
    "sequence parallel": (Grid(2, 1), {}, {"sequence_parallel": True}),
    "sequence parallel on four": (Grid(2, 2), {}, {"sequence_parallel": True}),
    "sequence parallel, layers again": (Grid(2, 1), {}, {"sequence_parallel": True, **FULL}),
    "context parallel": (Grid(), {"cp": 2}, {"context_parallel_size": 2}),
    "context and sequence parallel": (
        Grid(2, 1), {"cp": 2}, {"context_parallel_size": 2, "sequence_parallel": True},
    ),
    "context and pipeline parallel": (Grid(1, 2), {"cp": 2}, {"context_parallel_size": 2}),
    "distributed optimizer": (Grid(), {"copies": 2}, {"use_distributed_optimizer": True}),
    "distributed optimizer, overlapped": (
        Grid(), {"copies": 2},
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "distributed optimizer on four": (Grid(1, 2), {"copies": 2}, {"use_distributed_optimizer": True}),
    "overlapped gradients": (Grid(), {"copies": 2}, {"overlap_grad_reduce": True}),
}  # fmt: skip


def rank(weights, config, grid, path, keys):
    return train_rank(weights, config, grid, path, **keys)


@pytest.mark.parametrize("name", WAYS)
def test_a_run_spread_in_any_way_is_the_plain_loop(name, model, plain, tmp_path):  # noqa: F811
    grid, world, keys = WAYS[name]
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    ranks = run_ranks(rank, grid, model.state_dict(), config, grid, tmp_path, keys, **world)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses, norms, end = plain
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-5, rtol=0)
    assert np.allclose([row["grad norm"] for row in rows], norms, atol=1e-5, rtol=1e-5)
    spec = Spec.from_config(config)
    states = {place: {n: torch.from_numpy(w) for n, w in state.items()} for place, state in ranks}
    back = engine.to_hf(engine.join(states, spec, grid), spec)
    assert max((back[name] - end[name]).abs().max().item() for name in end) < 1e-4
