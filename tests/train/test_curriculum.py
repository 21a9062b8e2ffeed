"""SOLO's curriculum: three runs, each from a checkpoint of the one before, not from its export."""

import shutil

import pytest
from jobs import analysed, patched, saved

from plait import files
from plait.convert.layouts import trained
from plait.convert.stream import View
from plait.layout import HF_CONFIG
from plait.models.specs import Spec

STEPS = 4
STAGES = {"stage2": {"lr": 5e-3}, "stage3": {"lr": 1e-9, "min_lr": 0.0, "weight_decay": 0.0}}
"""The last one moves nothing that can be seen: it ends with the weights that it began with."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Three runs, trained one after the other."""
    places = [
        patched(tmp_path_factory.mktemp("solo"), train_iters=STEPS, save_interval=STEPS, hidden_dropout=0.0)
    ]
    for name, keys in STAGES.items():
        places[-1].train(to=STEPS)
        places.append(places[-1].after(name, STEPS, steps=STEPS, **keys))
        if name == "stage2":
            places[-1].analysis = other_mixture(places[-1])
    places[-1].train(to=STEPS)
    return places


def other_mixture(place):
    """A mixture of other shards than the first run's: copies of its one."""
    shards = [f"data/megatron_format/f_{name}_pack64/shard_00000" for name in "de"]
    shutil.copytree(place.root / shards[0], place.root / shards[1])
    sources = [{"prefix": one, "weight": weight} for one, weight in zip(shards, (0.25, 0.75), strict=True)]
    folder = analysed(place, {"sources": sources}, "y")
    files.write_manifest(folder, kind="analysis", settings={}, facts={})
    return "data/analysis/y"


def weights(place):
    folder = place.root / saved(STEPS, place.run)
    spec = Spec.of(folder, HF_CONFIG)
    return dict(View(trained(folder, spec)))


def test_each_stage_begins_with_the_weights_of_the_one_before_and_its_own_iterations(stages):
    first, second, third = map(weights, stages)

    moved = {name: (third[name] - tensor).abs().max().item() for name, tensor in second.items()}
    assert max(moved.values()) < 1e-7
    assert all((second[name] - tensor).abs().max().item() > 1e-4 for name, tensor in first.items())
    for place, before in zip(stages[1:], stages, strict=False):
        manifest = files.read_manifest(place.root / saved(STEPS, place.run))
        assert saved(STEPS, before.run) in manifest["inputs"]
        assert [row["iteration"] for row in place.rows()] == [1, 2, 3, 4]
        assert place.rows()[0]["learning-rate"] == 0


def test_a_stage_may_have_a_mixture_of_its_own_and_each_is_audited_against_its_own(stages):
    expected = [("x", {"d": 1}), ("y", {"d": 0.25, "e": 0.75}), ("x", {"d": 1})]
    for place, (mixture, shares) in zip(stages, expected, strict=True):
        manifest = files.read_manifest(place.root / saved(STEPS, place.run))
        audit = files.read_json(place.ckpts / "audit.json")
        assert f"data/analysis/{mixture}" in manifest["inputs"]
        assert {name: one["trained_share"] for name, one in audit["datasets"].items()} == shares


def test_pictures_are_learnt_from_stage_to_stage(stages):
    losses = [[row["img lm loss"] for row in place.rows()] for place in stages]
    assert losses[0][0] > losses[1][0] > losses[2][0]
