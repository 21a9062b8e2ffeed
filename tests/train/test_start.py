"""What a run's first segment starts from."""

import pytest
import torch

from plait.convert import engine
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train.job import Job
from plait.train.rank import _load_start
from plait.verify.ranks import run_ranks

CONFIG = {
    "architectures": ["MistralForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}  # fmt: skip


def drawn_rank(grid, seed):
    """This rank's part of a model that is drawn anew."""
    from megatron.core import parallel_state

    from plait.train.build import build_model

    spec = Spec.from_config(CONFIG)
    model = build_model(spec, grid, dtype=torch.float32)
    settings = {
        "init": "random", "init_method_std": 0.1, "seed": seed, "start_run": None,
        "tensor_model_parallel_size": grid.tp, "pipeline_model_parallel_size": grid.pp,
        "num_layers_in_first_pipeline_stage": None, "num_layers_in_last_pipeline_stage": None,
    }  # fmt: skip
    _load_start([model], Job("", "", "", "", settings), spec)
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    return place, {name: value.detach().numpy() for name, value in model.named_parameters()}


def drawn(grid, seed=3):
    spec = Spec.from_config(CONFIG)
    ranks = run_ranks(drawn_rank, grid, grid, seed)
    states = {place: {n: torch.from_numpy(v) for n, v in state.items()} for place, state in ranks}
    return engine.to_hf(engine.join(states, spec, grid), spec)


def test_init_random_is_of_the_given_std_and_equal_on_every_grid():
    whole = dict(drawn(Grid()))
    for grid in (Grid(2, 1), Grid(1, 2)):
        assert all(torch.equal(whole[name], value) for name, value in drawn(grid).items())
    weight = whole["model.layers.1.mlp.gate_proj.weight"]
    assert weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(whole["model.norm.weight"], torch.ones(64))
    other = drawn(Grid(), seed=4)["model.layers.1.mlp.gate_proj.weight"]
    assert not torch.equal(weight, other)
