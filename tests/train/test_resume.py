"""A run in segments is the run in one piece, bit for bit; an equal rebuild gives an equal manifest."""

import json
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from test_loop import AROUND, RUN, STEPS, feed, lr_at, model, plain  # noqa: F401 - two are fixtures
from ties import stage_of

from plait import files
from plait.errors import LayoutError
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks


def segment(weights, config, grid, run, start, stop, keys=MappingProxyType({}), every=None):
    """Train from a checkpoint, or from the weights, to the next checkpoint; keep states in between."""
    from megatron.core import parallel_state

    from plait.train.build import DTYPES, build_model, load_weights, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.saves import Saves
    from plait.train.state import TrainState
    from plait.train.writer import Origin

    settings = {**RUN, **keys}
    spec = Spec.from_config(config)
    dtype = DTYPES[settings.get("params_dtype", "fp32")]
    inner = build_model(spec, grid, dtype=dtype, run=settings)
    for parameter in inner.parameters():
        parameter.data.fill_(float("nan"))  # what is not loaded shows
    place = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    model = wrap([inner], settings)  # noqa: F811
    optimizer = optimizer_of(model, settings)
    state = TrainState([inner], optimizer, schedule_of(optimizer, settings, train_iters=STEPS, sequence=24))
    dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if start:
        before = run / f"iter_{start:07d}"
        manifest = files.read_manifest(before)
        same = manifest["facts"]["grid"] == grid.facts and manifest["settings"]["copies"] == dp[1]
        state.load(before, generators=same, optimizer=settings.get("load_optim", True))
    else:
        load_weights(inner, stage_of(weights, spec, grid, *place))
        optimizer.reload_model_params()
    target = run / f"iter_{stop:07d}"
    source = run / "source"
    origin = Origin(source, spec, grid, settings | {"copies": dp[1]}, {}, "")
    if torch.distributed.get_rank() == 0:
        source.mkdir(exist_ok=True)
        (source / HF_CONFIG).write_text(json.dumps(config))
    kept = replace(origin, kind="state")
    saves = Saves()

    def keep(goes_on):
        saves.save(state, run / f".state/iter_{state.iteration:07d}", kept, goes_on=goes_on)

    around = AROUND | {"non_persistent_save_interval": every}
    Trainer(model, state, feed(*dp), settings, around).train(stop, folder=run, keep=keep)
    saves.save(state, target, origin)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(1, 2)], ids=str)
def test_segments_end_where_one_piece_ends(model, grid, tmp_path):  # noqa: F811
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    arguments = model.state_dict(), config, grid
    for run, stops in (("whole", [STEPS]), ("again", [STEPS]), ("parts", [2, 3, STEPS])):
        (tmp_path / run).mkdir()
        for start, stop in zip([0, *stops], stops, strict=False):
            run_ranks(segment, grid, *arguments, tmp_path / run, start, stop)
    last = f"iter_{STEPS:07d}"
    manifests = {run: files.check_manifest(tmp_path / run / last) for run in ("whole", "again", "parts")}
    assert manifests["whole"] == manifests["again"]
    assert manifests["whole"]["files"] == manifests["parts"]["files"]  # weights, moments, schedule
    rows = {
        run: [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in manifests
    }
    for name in ("iteration", "lm loss", "grad norm", "learning-rate"):
        assert [row[name] for row in rows["whole"]] == [row[name] for row in rows["parts"]]


OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def test_states_between_change_nothing_where_weights_are_gathered_late(model, tmp_path):  # noqa: F811
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    for run, every in (("without", None), ("with", 2)):
        (tmp_path / run).mkdir()
        arguments = model.state_dict(), config, Grid(), tmp_path / run, 0, STEPS, OVERLAPPED, every
        run_ranks(segment, Grid(), *arguments, copies=2)
    last = f"iter_{STEPS:07d}"
    without, with_ = (files.check_manifest(tmp_path / run / last) for run in ("without", "with"))
    assert without["files"] == with_["files"]
    kept = sorted(path.name for path in (tmp_path / "with/.state").iterdir())
    assert kept == ["iter_0000002", "iter_0000004"]
    assert not (tmp_path / "without/.state").exists()


DISTRIBUTED = {"use_distributed_optimizer": True}


def test_with_a_distributed_optimizer_too(model, tmp_path):  # noqa: F811
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    for run, stops in (("whole", [STEPS]), ("parts", [2, 3, STEPS])):
        (tmp_path / run).mkdir()
        for start, stop in zip([0, *stops], stops, strict=False):
            arguments = model.state_dict(), config, Grid(), tmp_path / run, start, stop, DISTRIBUTED
            run_ranks(segment, Grid(), *arguments, copies=2)
    whole, parts = (files.check_manifest(tmp_path / run / f"iter_{STEPS:07d}") for run in ("whole", "parts"))
    assert whole["files"] == parts["files"]


@pytest.mark.parametrize("keys", [{}, DISTRIBUTED], ids=["plain optimizer", "distributed optimizer"])
@pytest.mark.parametrize(
    ("grid", "copies"), [(Grid(1, 1), 1), (Grid(1, 2), 1), (Grid(2, 2), 1), (Grid(1, 1), 2)], ids=str
)
def test_a_run_goes_on_on_another_grid(model, plain, grid, copies, keys, tmp_path):  # noqa: F811
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    first, world = (Grid(2, 1), 1) if not keys else (Grid(1, 1), 2)
    run_ranks(segment, first, model.state_dict(), config, first, tmp_path, 0, 3, keys, copies=world)
    run_ranks(segment, grid, model.state_dict(), config, grid, tmp_path, 3, STEPS, keys, copies=copies)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses, norms, _ = plain
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-4, rtol=0)
    assert np.allclose([row["grad norm"] for row in rows], norms, atol=1e-4, rtol=0)
    assert np.allclose([row["learning-rate"] for row in rows], [lr_at(step) for step in range(STEPS)])


def test_a_run_goes_on_within_a_skipped_range_as_in_one_piece(model, tmp_path):  # noqa: F811
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    skips = {"skip_train_iteration_range": ("2-4",)}
    for run, stops in (("whole", [STEPS]), ("parts", [3, STEPS])):
        (tmp_path / run).mkdir()
        for start, stop in zip([0, *stops], stops, strict=False):
            arguments = model.state_dict(), config, Grid(), tmp_path / run, start, stop, skips
            run_ranks(segment, Grid(), *arguments)
    whole, parts = (files.check_manifest(tmp_path / run / f"iter_{STEPS:07d}") for run in ("whole", "parts"))
    assert whole["files"] == parts["files"]


def test_a_folder_that_plait_did_not_make_is_not_overwritten(model, tmp_path):  # noqa: F811
    strange = tmp_path / "iter_0000002"
    strange.mkdir()
    (strange / "weights.bin").write_bytes(np.arange(3).tobytes())
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    with pytest.raises(Exception, match="plait did not make") as caught:
        run_ranks(segment, Grid(), model.state_dict(), config, Grid(), tmp_path, 0, 2)
    assert LayoutError.__name__ not in str(caught.value)  # a sentence, no stack
    assert (strange / "weights.bin").exists()
