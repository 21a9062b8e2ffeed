"""A run of an interleaved pipeline starts from a sharded model, and goes on on any grid."""

import json
from dataclasses import replace

import pytest
import torch
from jobs import SPLIT
from makers import Maker
from spread import LENGTH, STEPS, Way, recipes

from plait import files
from plait.convert import layouts
from plait.convert.stream import View
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

HALF = STEPS // 2
CHUNKS = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SHARED = {"data_parallel_size": 2, "use_distributed_optimizer": True}
ONE: dict = {}


def segment(recipe, way, sharded, run, start, stop):
    """Train from the sharded model, or from a checkpoint of any grid, to a checkpoint."""
    from megatron.core import parallel_state

    from plait.config.run import Around
    from plait.train.build import build_chunks, optimizer_of, schedule_of, wrap
    from plait.train.job import Job
    from plait.train.loop import Trainer
    from plait.train.rank import _load_start
    from plait.train.saves import Saves
    from plait.train.state import TrainState
    from plait.train.writer import Origin

    settings, around = recipe.settings(way) | SPLIT, Around(peak_tflops=1.0, eval_interval=HALF).model_dump()
    spec = Spec.of(sharded, HF_CONFIG)
    chunks = build_chunks(spec, way.grid, dtype=torch.float32, run=settings)
    if not start:
        _load_start(chunks, Job(str(sharded), "", "", "", settings, around), spec)
    model = wrap(chunks, settings)
    optimizer = optimizer_of(model, settings)
    state = TrainState(
        chunks, optimizer, schedule_of(optimizer, settings, train_iters=STEPS, sequence=LENGTH)
    )
    if start:
        state.load(start, generators=False)
    copy = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    trainer = Trainer(model, state, recipe.feed(way, *copy), settings, around | {"eval_iters": 2})
    trainer.evaluation = recipe.feed(way, *copy)
    trainer.train(stop, folder=run)
    Saves().save(state, run / f"iter_{stop:07d}", Origin(sharded, spec, way.grid, settings, {}, ""))


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def made(maker):
    found = recipes(maker)
    return {**found, "llava, tied": replace(found["llava"], folder=maker.tied_llava())}


def trained(maker, recipe, keys, run, start=None, stop=STEPS):
    """A segment in a run's folder; the checkpoint it ends with."""
    way = Way(keys)
    sharded = maker.shards(recipe.folder, way.grid.tp, way.grid.pp)
    run.mkdir(exist_ok=True)
    run_ranks(segment, way.grid, recipe, way, sharded, run, start, stop, **way.world)
    return run / f"iter_{stop:07d}"


def weights(folder):
    """Hugging Face's tensors of a checkpoint."""
    spec = Spec.of(folder, HF_CONFIG)
    return dict(View(layouts.trained(folder, spec)))


def losses(run, name="lm loss"):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def alike(found, wanted):
    """Two runs that went to the end."""
    for name, times in {"lm loss": STEPS, "validation lm loss": STEPS // HALF}.items():
        assert len(losses(found, name)) == times
        assert losses(found, name) == pytest.approx(losses(wanted, name), abs=1e-5, rel=0)
    last = f"iter_{STEPS:07d}"
    ours, theirs = weights(found / last), weights(wanted / last)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


MOVES = {
    "from chunks to one process": (CHUNKS, ONE),
    "from stages to chunks": ({"pipeline_model_parallel_size": 2}, CHUNKS),
    "from chunks to stages": (CHUNKS, {"pipeline_model_parallel_size": 2}),
    "from chunks to tensor ranks": (CHUNKS, {"tensor_model_parallel_size": 2}),
    "from chunks to chunks of tensor ranks": (CHUNKS, {**CHUNKS, "tensor_model_parallel_size": 2}),
    "from chunks to copies": ({**CHUNKS, **SHARED}, SHARED),
    "from copies to chunks": (SHARED, {**CHUNKS, **SHARED}),
}
SHORT = "from chunks to one process"


@pytest.fixture(scope="module")
def straight(maker, made, tmp_path_factory):
    """The chat in one piece, by one process."""
    run = tmp_path_factory.mktemp("straight")
    trained(maker, made["chat"], ONE, run)
    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == SHORT else pytest.mark.long) for name in MOVES]
)
def test_a_run_goes_on_with_chunks_or_without(name, maker, made, straight, tmp_path):
    first, second = MOVES[name]
    before = trained(maker, made["chat"], first, tmp_path / "run", stop=HALF)
    trained(maker, made["chat"], second, tmp_path / "run", before)
    alike(tmp_path / "run", straight)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["solo", "llava", "llava, tied"])
def test_so_do_runs_that_see(recipe, maker, made, tmp_path):
    trained(maker, made[recipe], ONE, tmp_path / "one")
    before = trained(maker, made[recipe], CHUNKS, tmp_path / "run", stop=HALF)
    trained(maker, made[recipe], CHUNKS, tmp_path / "run", before)
    alike(tmp_path / "run", tmp_path / "one")


@pytest.mark.long
def test_segments_of_chunks_end_where_one_piece_ends(maker, made, tmp_path):
    whole = trained(maker, made["chat"], CHUNKS, tmp_path / "whole")
    before = trained(maker, made["chat"], CHUNKS, tmp_path / "parts", stop=HALF)
    parts = trained(maker, made["chat"], CHUNKS, tmp_path / "parts", before)
    whole, parts = files.check_manifest(whole)["files"], files.check_manifest(parts)["files"]
    assert whole == parts


def test_uneven_stages_are_not_cut_into_chunks():
    with pytest.raises(Exception, match="first stage of 1 layers are not cut into 2 chunks"):
        Grid(pp=2, first=1).interleaved(2)
