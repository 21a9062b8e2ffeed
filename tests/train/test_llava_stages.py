"""LLaVA-JP's two stages: the second starts from an iteration of the first, not from its export."""

import multiprocessing
import os
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from jobs import blended, pictured, saved

from plait import files
from plait.config.run import STAGES, Around, Asked
from plait.convert.layouts import released, trained
from plait.convert.stream import View
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.train.debug import environment
from plait.train.job import Job
from plait.train.rank import run_rank

STEPS, LENGTH = 3, 512
CAPTIONS = {"template": "jp_alpaca", "instruction": "none", "language": "ja", "picture_tokens": 9}
QUESTIONS = CAPTIONS | {"instruction": "drawn"}
KEYS = {
    "recipe": "llava_jp", "train_iters": STEPS, "save_interval": STEPS, "global_batch_size": 4,
    "micro_batch_size": 2, "hidden_dropout": 0.0, "lr": 1e-2,
}  # fmt: skip


def rank(job):
    os.environ |= environment()
    run_rank(job)


def train(place, mixture, *, to):
    """The job in a fork of this process, which has loaded everything already."""
    around = Around(**place.around).model_dump(mode="json")
    job = Job(
        start=place.start, analysis=f"data/analysis/{mixture}",
        schedule=f"data/ckpts/{place.run}/schedule.json", target=saved(to, place.run),
        settings=place.settings, around=around, asked=Asked(until=STEPS).model_dump(mode="json"),
    )  # fmt: skip
    with chdir(place.root):
        job.check()
        process = multiprocessing.get_context("fork").Process(target=rank, args=(job,))
        process.start()
        process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Both runs; the second saves every iteration."""
    first = pictured(tmp_path_factory.mktemp("japanese"), form=CAPTIONS, stage=1, **KEYS)
    blended(first, QUESTIONS, "y", LENGTH)
    train(first, "x", to=STEPS)
    keys = STAGES[2] | {key: KEYS[key] for key in STAGES[2].keys() & KEYS.keys()}
    second = first.after("stage2", STEPS, steps=STEPS, stage=2, mixture="y", **keys)
    files.write_json(second.ckpts / "schedule.json", {"train_iters": STEPS, "save_interval": 1})
    train(second, "y", to=1)
    return first, second


def weights(folder):
    """By transformers' names."""
    spec, read = Spec.of(folder, HF_CONFIG), trained if "iter_" in folder.name else released
    return dict(View(read(folder, spec)))


def part(name):
    return next(one for one in ("vision_tower", "projector", "language_model") if one in name)


def moved(before, after):
    """Parts some of whose weights are others now; the rest have the same bits."""
    assert before.keys() == after.keys()
    return {part(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_each_stage_trains_its_parts_from_where_the_one_before_ended(stages):
    first, second = stages
    start = weights(first.root / first.start)
    one = weights(first.root / saved(STEPS))
    begun = weights(first.root / saved(1, "stage2"))
    last = weights(second.ckpts / f".saved/iter_{STEPS:07d}")  # until its own job moves it into place

    assert moved(start, one) == {"projector"}
    assert second.rows()[0]["learning-rate"] == 0
    assert moved(one, begun) == set()
    assert moved(one, last) == {"projector", "language_model"}


def test_the_second_counts_its_own_iterations_and_reads_its_own_mixture(stages):
    first, second = stages
    manifest = files.read_manifest(first.root / saved(1, "stage2"))
    assert saved(STEPS) in manifest["inputs"]
    assert "data/analysis/y" in manifest["inputs"]
    assert [row["iteration"] for row in second.rows()] == [1, 2, 3]
    assert all(row["img lm loss"] > 0 for row in second.rows())
    assert Path(second.ckpts / "samples").is_dir()
