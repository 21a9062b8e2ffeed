"""Models and checkpoints of others: checked, taken as they are, proven like any, and never removed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from makers import save
from projects import contents

from plait import files
from plait.convert import checkpoint
from plait.convert.carried import carry
from plait.convert.tables import entries
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

HF = "data/models/raw_hf/mine"
WHOLE, CUT = "data/models/raw/mine-megatron", "data/models/sharded/mine-megatron-tp2-pp1"
CONFIG = {"raw_hf": {"mine": {"kind": "folder", "path": HF}}}
RUN = {
    **CONFIG,
    "tokenizers": {"mine": {"kind": "folder", "path": HF}},
    "formats": {"plain": {"tokenizer": "mine", "template": "chatml"}},
    "mixtures": {"some": {"format": "plain", "pack": 64, "datasets": ["dialogues"]}},
    "runs": {
        "old": {"recipe": "chat", "model": "mine", "mixture": "some", "train_iters": 50, "save_interval": 10}
    },
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


def clone(source, target):
    """A git clone whose large file is a pointer; the content of that file."""
    origin = target.parent / "origin"
    shutil.copytree(source, origin, ignore=shutil.ignore_patterns("plait.json"))
    large = origin / "model.safetensors"
    content = large.read_bytes()
    large.write_text(POINTER.format(files.digest(large), len(content)))
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "model"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", origin, *words], check=True
        )
    subprocess.run(["git", "clone", "-q", origin, target], check=True)
    shutil.rmtree(origin)
    return content


def test_an_adopted_model_of_the_hub_is_not_fetched(project, adopt, maker, put):
    of_hub = {**CONFIG, "raw_hf": {**CONFIG["raw_hf"], "mine": {"kind": "hub", "repo": "us/tiny"}}}
    put(maker.hf(), HF)
    status, said = adopt(HF, config=of_hub)
    assert status == 0, said

    assert project.plan(HF, config=of_hub).nothing
    assert project.plan(WHOLE, config=of_hub).rules == {"convert": 1}
    locked = {"models/us/tiny@main": {"commit": "a" * 40, "files": {}}}
    project.write("config/hub.lock.json", json.dumps(locked))
    assert project.plan(WHOLE, config=of_hub).rules == {"convert": 1}


@pytest.mark.long
def test_a_clone_without_and_with_its_large_files(project, adopt, maker):
    folder = project.folder / HF
    folder.parent.mkdir(parents=True)
    content = clone(maker.hf(), folder)
    before = contents(folder)

    for target in (HF, WHOLE):
        text = project.refusal(target, config=CONFIG)
        assert f"{HF} stands where plait would write" in text
        assert f"`plait adopt {HF}`" in text
    status, said = adopt(HF, config=CONFIG)
    assert status == 2
    assert "model.safetensors is a pointer of git LFS" in said
    assert f"hint:  git -C {project.folder / HF} lfs pull" in said
    assert contents(folder) == before

    (folder / "model.safetensors").write_bytes(content)  # what `git lfs pull` does
    before = contents(folder)
    status, said = adopt(HF, config=CONFIG)
    assert status == 0, said
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    assert {Path(path).name for path in after.keys() - before.keys()} <= {
        "plait.json",
        "generation_config.json",
    }
    manifest = files.check_manifest(folder)
    assert manifest["facts"]["merkle"] == files.read_manifest(maker.hf())["facts"]["merkle"]
    assert not any(name.startswith(".git") for name in manifest["files"])

    assert project.plan(HF, config=CONFIG).nothing
    assert project.plan(WHOLE, config=CONFIG).rules == {"convert": 1}
    assert "was adopted already" in adopt(HF, config=CONFIG)[1]


@pytest.mark.long
def test_what_was_adopted_is_removed_by_no_force_and_no_old_record(project, adopt, put, maker):
    made = {"raw_hf": {"mine": {"kind": "init_tower"}}}
    project.run(HF, config=made)
    shutil.rmtree(project.folder / HF)
    folder = put(maker.hf(), HF)
    assert adopt(HF, config=CONFIG)[0] == 0
    before = contents(folder)

    assert project.plan(HF, config=CONFIG).nothing
    assert project.snakemake("--cores", "1", HF, config=CONFIG).code == 0
    for words in (["-F"], ["-f"], ["--forcerun", "model"]):
        done = project.snakemake("--cores", "1", HF, *words, config=CONFIG)
        assert done.code == 1
        assert "was adopted, and nothing is made in its place" in done.text
    text = project.refusal(WHOLE, config=made)
    assert f"{HF} was adopted with another source than config/ has now" in text
    assert contents(folder) == before


def test_a_tokenizer_in_an_older_form_stays_and_is_known_by_todays(project, adopt, put, maker):
    folder = put(maker.hf(), HF)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=7))
    old = files.digest(tokenizer)

    assert adopt(HF, config=CONFIG)[0] == 0
    project.run(WHOLE, config=CONFIG)

    assert files.digest(tokenizer) == old
    facts = files.read_manifest(project.folder / WHOLE)["facts"]
    assert facts["tokenizer"] == files.read_manifest(maker.megatron(maker.hf()))["facts"]["tokenizer"] != old


SIZE = '"intermediate_size": {}'
TOWER = {"raw_hf": {"mine": {"kind": "init_tower"}}}


def widen(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace(SIZE.format(48), SIZE.format(50)))


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def other_digests(folder):
    (folder / "tensors.json").write_text("{}")


REFUSED = {
    "nothing there": (shutil.rmtree, "there is nothing at", CONFIG),
    "another shape": (widen, "its config says (50, 32)", CONFIG),
    "no safetensors": (drop_weights, "has neither model.safetensors", CONFIG),
    "digests of other tensors": (other_digests, "tensors.json is not of the weights beside it", CONFIG),
    "made by plait": (Path.is_dir, f"{{mine: {{kind: folder, path: {HF}}}}}", TOWER),
    "not in config": (Path.is_dir, "there is no raw_hf 'mine' in config/", {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adopted_says_what_to_do(name, adopt, put, maker):
    spoil, sentence, config = REFUSED[name]
    folder = put(maker.hf(), HF)
    spoil(folder)

    status, said = adopt(HF, config=config)

    assert status == 2
    assert sentence in said
    assert not (folder / "plait.json").exists()


# Megatron's own layouts


class AttnBackend:
    """Stands for an enum of Megatron's: its class is not there when the file is read."""


def as_megatron_trained(folder, grid, *, name, engine):
    """Make a release look as Megatron-LM writes it while training; names of Transformer Engine's layers."""
    (folder / "release").rename(folder / name)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(int(name.removeprefix("iter_"))))
    spec = Spec.of(folder, "hf_config.json")
    (folder / "hf_config.json").unlink()
    names = {
        e.local(spec, grid): e.local_engine(spec, grid) for e in entries(spec) if e.row.engine and engine
    }
    for tp, pp in grid:
        path = folder / name / grid.folder(tp=tp, pp=pp) / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        content["model"] = {names.get(key, key): value.clone() for key, value in content["model"].items()}
        content["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
        content["args"].attention_backend = AttnBackend()
        torch.save({**content, "optimizer": {"state": AttnBackend()}, "rng_state": [AttnBackend()]}, path)


@pytest.mark.parametrize("engine", [False, True], ids=["local", "transformer-engine"])
def test_a_model_as_megatron_writes_it_is_read_compared_and_proven(project, adopt, put, maker, engine):
    put(maker.hf(), HF)
    folder = put(maker.shards(maker.hf(), 2, 1), CUT)
    as_megatron_trained(folder, Grid(2, 1), name="iter_0000007", engine=engine)
    before = contents(folder)
    assert "plait adopt" in project.refusal(f"data/verify/{CUT[5:]}/parity.json", config=CONFIG)
    assert f"which is not there yet\nhint:  snakemake {HF}" in adopt(CUT, config=CONFIG)[1]

    status, said = adopt(HF, CUT, config=CONFIG)

    assert status == 0, said
    assert "written beside: hf_config.json" in said
    assert before.items() <= contents(folder).items()
    taken, made = (files.read_manifest(one)["facts"] for one in (folder, maker.shards(maker.hf(), 2, 1)))
    assert taken == made
    proof = f"data/verify/{CUT[5:]}/parity.json"
    assert project.plan(proof, config=CONFIG).rules == {"verify_sharded": 1}
    if engine:
        project.run(proof, config=CONFIG)
        assert json.loads((project.folder / proof).read_text())["passed"]
        assert project.plan(proof, config=CONFIG).nothing


def test_a_whole_model_with_other_weights_is_no_conversion_of_its_source(adopt, put, maker, project):
    put(maker.hf(), HF)
    folder = put(maker.megatron(maker.hf()), WHOLE)
    path = checkpoint.rank_file(folder, Grid(), 0, 0)
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(content, path)

    status, said = adopt(HF, WHOLE, config=CONFIG)

    assert status == 2
    assert f"{WHOLE} has other weights than {HF}" in said
    assert "is adopted as data/ckpts/RUN/iter_NNNNNNN" in said


# Training checkpoints


def old_iteration(maker, target, grid, *, classic):
    """A checkpoint as a trainer left it, with no manifest and no config beside it."""
    shards = maker.shards(maker.hf(), grid.tp, grid.pp)
    target.mkdir(parents=True)
    if classic:
        for rank in (shards / "release").iterdir():
            shutil.copytree(rank, target / rank.name)
    else:
        run_ranks(save, grid, shards, grid, target)


@pytest.mark.parametrize(
    "classic",
    [pytest.param(False, id="torch_dist"), pytest.param(True, id="classic", marks=pytest.mark.long)],
)
def test_an_old_iteration_is_exported_and_proven(project, adopt, put, maker, classic):
    run = {**RUN, "runs": {"old": {**RUN["runs"]["old"], "tensor_model_parallel_size": 2}}}
    put(maker.hf(), HF)
    iteration = "data/ckpts/old/iter_0000007"
    elsewhere = project.folder.parent / "elsewhere"
    old_iteration(maker, elsewhere, Grid(2, 1), classic=classic)
    (project.folder / iteration).parent.mkdir(parents=True)
    (project.folder / iteration).symlink_to(elsewhere)
    before = contents(project.folder / iteration)
    assert adopt(HF, config=run)[0] == 0
    assert f"`plait adopt {iteration}`" in project.refusal("data/ckpts/old/hf/model_iter_7", config=run)

    status, said = adopt(iteration, config=run)

    assert status == 0, said
    assert before.items() <= contents(project.folder / iteration).items()
    assert project.plan(f"{iteration}/plait.json", config=run).nothing
    target = "data/ckpts/old/hf/model_iter_7"
    assert project.plan(target, config=run).rules == {"export": 1}
    project.run(target, config=run)
    exported = files.check_manifest(project.folder / target)["facts"]
    assert exported["merkle"] == files.read_manifest(maker.hf())["facts"]["merkle"]
    assert project.plan(target, config=run).nothing


def test_an_iteration_of_another_model_is_refused(project, adopt, put, maker, tmp_path):
    other = maker.hf("wider", intermediate_size=64)
    put(other, HF)
    iteration = "data/ckpts/old/iter_0000007"
    old_iteration(maker, project.folder / iteration, Grid(1, 1), classic=False)

    status, said = adopt(HF, iteration, config=RUN)

    assert status == 2
    assert "has shape" in said or "elements" in said or "is (" in said, said
    carry(maker.shards(maker.hf(), 1, 1), project.folder / iteration)
    assert f"is not the config.json of {HF}" in adopt(iteration, config=RUN)[1]
