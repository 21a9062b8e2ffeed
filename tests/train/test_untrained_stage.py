"""A run goes on where nothing of a pipeline stage is trained, as with a projector alone."""

import pytest
import torch
from makers import Maker
from saving import save_tensors
from test_loop import RUN, STEPS

from plait.convert import checkpoint
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train.build import build_model, freeze, load_weights, optimizer_of, schedule_of, wrap
from plait.train.state import TrainState
from plait.verify.ranks import run_ranks

FROZEN = ("language_model", "vision_model")


def a_state(shards, grid, dtype, keys):
    from megatron.core import parallel_state as ps

    place = ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank()
    run, spec = RUN | keys, Spec.of(shards, HF_CONFIG)
    inner = build_model(spec, grid, dtype=dtype, run=run)
    load_weights(inner, checkpoint.read_rank(shards, grid, *place))
    freeze([inner], FROZEN)
    optimizer = optimizer_of(wrap([inner], run), run)
    return TrainState([inner], optimizer, schedule_of(optimizer, run, train_iters=STEPS, sequence=24), 3)


def saved_and_loaded(shards, grid, dtype, keys, folder):
    """Moments before a checkpoint and after it."""

    before, after = (a_state(shards, grid, dtype, keys) for _ in range(2))
    for one in before.model[0].parameters():
        if one.requires_grad:
            one.main_grad.fill_(0.5)
    before.optimizer.step()
    save_tensors(before.sharded(is_loading=False), folder)
    after.load(folder)
    return [moments(each.optimizer) for each in (before, after)]


def moments(optimizer):
    states = [state for _, state in optimizer.state.items()]
    return [one.tolist() for state in states for one in state.values() if torch.is_tensor(one)]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_distributed_optimizer": True}, id="distributed", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stage_of_which_nothing_is_trained_is_loaded(dtype, keys, tmp_path):
    maker, grid = Maker(tmp_path / "made"), Grid(1, 2)
    (tmp_path / "iter").mkdir()
    shards = maker.shards(maker.llava(), grid.tp, grid.pp)
    first, last = run_ranks(saved_and_loaded, grid, shards, grid, dtype, keys, tmp_path / "iter")
    assert first[0]
    assert first[0] == first[1]
    assert last == [[], []]
