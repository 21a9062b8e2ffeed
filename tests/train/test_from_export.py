"""A checkpoint whose optimizer is gone is exported with its proof, and another run starts from that."""

import json
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from jobs import Place, packed, saved
from safetensors.torch import load_file

from plait import files, layout
from plait.cli.main import main
from plait.convert import layouts
from plait.convert.stream import View
from plait.models.specs import Spec

pytestmark = pytest.mark.long
STEPS = 3
SOURCE, AGAIN = "data/models/raw_hf/m", "data/models/raw_hf/again"
EXPORT = f"data/ckpts/r/hf/model_iter_{STEPS}"
STILL = {"lr": 1e-9, "min_lr": 0.0, "weight_decay": 0.0, "lr_warmup_iters": 0}
"""A run that moves nothing that can be seen: it ends with the weights that it began with."""


def plait(stage, *words, **settings):
    assert main([stage, *words, "--settings", json.dumps({"stage": stage, "version": 1, **settings})]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run that leaves its last optimizer behind, and the export of its last checkpoint."""
    place = packed(
        tmp_path_factory.mktemp("exported"), train_iters=STEPS, save_interval=STEPS, hidden_dropout=0.0
    )
    place.train(to=STEPS, save_optim="none")
    (place.root / SOURCE).parent.mkdir()
    (place.root / SOURCE).symlink_to(place.root / "made/hf-base")
    with chdir(place.root):
        plait("export", SOURCE, saved(STEPS), EXPORT, recipe="chat", template="pretrain")
    return place


def weights(folder):
    spec = Spec.of(folder, layout.HF_CONFIG)
    found = View(layouts.trained(folder, spec))
    return {name: tensor.clone() for name, tensor in found.items()}


def test_a_checkpoint_without_its_optimizer_is_exported_and_proven(place, monkeypatch):
    monkeypatch.chdir(place.root)
    assert files.pruned(saved(STEPS)) == {"optimizer__0_0.distcp": "save_optim: none"}
    assert not [*Path(saved(STEPS)).glob(layout.OPTIMIZER_FILES)]
    proof = files.read_json(layout.Export(run="r", step=STEPS).proof)
    assert proof["passed"]
    assert proof["reference"] == saved(STEPS)
    assert proof["merkle_root"] == files.check_manifest(EXPORT)["facts"]["merkle"]
    exported, trained = load_file(f"{EXPORT}/model.safetensors"), weights(saved(STEPS))
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())


def test_who_would_go_on_from_it_is_refused_by_name_and_its_weights_may_be_taken(place, monkeypatch, capsys):
    monkeypatch.chdir(place.root)
    goes_on = place.after("on", STEPS, steps=2 * STEPS, finetune=False)
    words = goes_on.words(after=0, to=2 * STEPS)[3:]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{saved(STEPS)} has no optimizer any more: save_optim: none removed it" in said
    assert "start from the newest iteration of the run, which is whole" in said
    assert not (goes_on.ckpts / "metrics.jsonl").exists()


def test_another_run_starts_from_the_export(place, monkeypatch):
    monkeypatch.chdir(place.root)
    sharded = "data/models/sharded/again-megatron-tp1-pp1"
    plait("build", AGAIN, source={"kind": "folder", "path": EXPORT})
    plait("convert", AGAIN, "data/models/raw/again-megatron")
    plait("shard", "data/models/raw/again-megatron", sharded)
    files.write_json("data/ckpts/s/schedule.json", {"train_iters": 2, "save_interval": 2})
    second = Place(place.root, place.settings | {"model": "again", **STILL}, sharded, place.around, "s")

    second.train(to=2)

    exported, trained = load_file(f"{EXPORT}/model.safetensors"), weights(saved(2, "s"))
    assert max((trained[name] - tensor).abs().max().item() for name, tensor in exported.items()) < 1e-7
    before = load_file(f"{SOURCE}/model.safetensors")
    assert max((before[name] - tensor).abs().max().item() for name, tensor in exported.items()) > 1e-3
    assert [row["iteration"] for row in second.rows()] == [1, 2]
    assert files.read_manifest(saved(2, "s"))["inputs"].keys() >= {sharded}
    merkle = files.read_manifest(EXPORT)["facts"]["merkle"]
    assert files.read_manifest(sharded)["facts"]["merkle"] == merkle
