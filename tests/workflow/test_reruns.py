"""What changes a result plans exactly what follows; what does not plans nothing. On a real run."""

import json
import os
import re
import shutil

import pytest
from projects import Project

from plait.files import digest, prune, read_manifest

EXPORT = "data/ckpts/chat-tiny/hf/model_iter_4"
SMALL = {
    "datasets": {"dialogues": {"source": {"languages": ["english"]}}},
    "raw_hf": {"Mistral-tiny": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}},
    "runs": {
        "chat-tiny": {
            "pipeline_model_parallel_size": 1,
            "save_interval": 2,
            "saves_per_job": 2,
            "lr_warmup_iters": 1,
            "exports": [4],
        }
    },
}
SHARD = "data/megatron_format/chatml_dialogues_pack256/shard_00001"


def overlay(section=None, name=None, **keys):
    """The small plan with keys changed."""
    changed = {key: {inner: dict(found) for inner, found in value.items()} for key, value in SMALL.items()}
    if section:
        changed.setdefault(section, {}).setdefault(name, {}).update(keys)
    return changed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A project whose run was trained for two checkpoints and exported, by the short form."""
    project = Project.make(tmp_path_factory.mktemp("whole") / "project")
    project.run("ckpts/chat-tiny/hf/model_iter_4", config=SMALL)
    return project


@pytest.fixture
def copy(whole, tmp_path):
    return whole.copy(tmp_path / "copy")


AFTER_MODEL = {"convert": 1, "verify_megatron": 1, "shard": 1, "verify_sharded": 1, "train": 2, "export": 1}
AFTER_INDEX = {"analyse": 1, "schedule": 1, "train": 2, "export": 1}
CHANGES = {
    "nothing": (overlay(), {}),
    "another run": (overlay("runs", "solo-tiny", lr=1.0), {}),
    "exports": (overlay("runs", "chat-tiny", exports=[2]), {}),
    "lr": (overlay("runs", "chat-tiny", lr=0.25), {"train": 2, "export": 1}),
    "epochs": (overlay("runs", "chat-tiny", epochs=3), {"schedule": 1, "train": 2, "export": 1}),
    "template": (overlay("formats", "chatml", template="pretrain"), {"index": 2, **AFTER_INDEX}),
    "shards": (overlay("datasets", "dialogues", shards=3), {"chat": 3, "index": 3, **AFTER_INDEX}),
    "weights": (overlay("raw_hf", "Mistral-tiny", seed=7), {"model": 2, **AFTER_MODEL}),
    "new rows": (overlay("raw_hf", "Mistral-tiny-chatml", new_rows="zeros"), {"model": 1, **AFTER_MODEL}),
    "tokenizer": (
        overlay("tokenizers", "mistral-chatml", add=["locations", "chatml"]),
        {"tokenizer": 1, "model": 1, "index": 2, **AFTER_INDEX, **AFTER_MODEL},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_plans_exactly_what_follows(name, whole):
    config, rules = CHANGES[name]

    plan = whole.plan(EXPORT, config=config)

    assert plan.rules == rules
    assert plan.nothing == (not rules)


VERSIONS = {
    "raw": {"raw": 1, "chat": 2, "index": 2, **AFTER_INDEX},
    "analyse": AFTER_INDEX,
    "convert": AFTER_MODEL,
    "verify": {"verify_megatron": 1, "shard": 1, "verify_sharded": 1, "train": 2, "export": 1},
    "train": {"train": 2, "export": 1},
    "export": {"export": 1},
}


@pytest.mark.parametrize("stage", VERSIONS)
def test_a_raised_version_of_a_stage_plans_it_and_all_after_it(stage, whole):
    raised = f"from plait.config import plan; plan.VERSIONS[{stage!r}] += 1"
    start = ("-c", f"{raised}\nfrom snakemake.cli import main; main()")

    assert whole.plan(EXPORT, config=SMALL, start=start).rules == VERSIONS[stage]


def test_one_job_saved_both_checkpoints_and_each_has_its_own_manifest(whole):
    logs = [(whole.folder / f"data/logs/train/chat-tiny/iter_000000{n}.log").read_text() for n in (2, 4)]
    assert "iteration 4/4" in logs[0]
    assert "iter_0000004 was saved by a job before: it is moved into place" in logs[1]
    manifests = [read_manifest(whole.folder / f"data/ckpts/chat-tiny/iter_000000{n}") for n in (2, 4)]
    before = "data/ckpts/chat-tiny/iter_0000002"
    assert manifests[1]["inputs"][before] == digest(whole.folder / before / "plait.json")
    assert before not in manifests[0]["inputs"]


def test_what_is_thinned_out_plans_nothing_and_is_refused_by_name(copy):
    thin = copy.folder / "data/ckpts/chat-tiny/iter_0000002"
    prune(thin, ["__0_0.distcp", "optimizer__0_0.distcp"], "keep: last 1")

    assert copy.plan(EXPORT, config=SMALL).nothing
    text = copy.refusal("data/ckpts/chat-tiny/hf/model_iter_2", config=SMALL)
    assert "data/ckpts/chat-tiny/iter_0000002 has no weights any more: keep: last 1 removed them" in text


def test_a_dry_run_says_what_the_checkpoints_take(whole):
    config = overlay("runs", "chat-tiny", save_optim="last", keep="last 1")
    text = whole.plan("data/ckpts/chat-tiny/hf/model_iter_8", config=config).text
    (line,) = [line for line in text.splitlines() if line.startswith("Run chat-tiny: ")]
    weights, optimizer, most = map(float, re.findall(r"([\d.e-]+) GB(?: of| at)", line)[:3])
    size = (whole.folder / "data/models/raw_hf/Mistral-tiny-chatml/model.safetensors").stat().st_size
    assert weights == pytest.approx(size / 1e9, rel=0.01)
    assert optimizer == pytest.approx(2 * weights, rel=0.01)
    assert most == pytest.approx(3 * (weights + optimizer), rel=0.01)  # 4, and the two that a job writes
    assert "keep: last 1, save_optim: last" in line


def test_the_next_checkpoint_trains_from_the_last_one(whole):
    assert whole.plan("data/ckpts/chat-tiny/hf/model_iter_6", config=SMALL).jobs == [
        "export data/ckpts/chat-tiny/hf/model_iter_6",
        "train data/ckpts/chat-tiny/iter_0000006/plait.json",
    ]


def test_both_forms_are_one_artifact(whole):
    short = whole.folder / "ckpts/chat-tiny/hf/model_iter_4"

    assert short.is_symlink()
    assert short.samefile(whole.folder / EXPORT)
    assert whole.plan("ckpts/chat-tiny/hf/model_iter_4", config=SMALL).nothing


def test_another_checkout_with_new_mtimes_comments_and_spaces_plans_nothing(copy):
    for path in sorted(copy.folder.rglob("*"), reverse=True):
        os.utime(path, follow_symlinks=False)
    for source in [copy.folder / "Snakefile", *copy.folder.glob("workflow/**/*.smk")]:
        text = source.read_text().replace('"plait ', '"plait  ')
        source.write_text(f"{text}\n\n# A comment changes nothing.\n")

    assert copy.plan(EXPORT, config=SMALL).nothing


@pytest.mark.long
def test_evaluating_on_other_data_makes_them_and_trains_nothing_again(copy):
    held_out = {
        "datasets": {"held-out": {"source": {"kind": "chat-jsonl", "path": "held"}}},
        "mixtures": {"held-out": {"format": "chatml", "pack": 256, "datasets": ["held-out"]}},
    }
    evaluated = overlay("runs", "chat-tiny", eval_interval=2, eval_iters=1, eval_mixture="held-out")
    evaluated = {key: {**evaluated.get(key, {}), **held_out.get(key, {})} for key in evaluated | held_out}
    copy.write(
        "held/one.jsonl", '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n'
    )
    metrics = copy.folder / "data/ckpts/chat-tiny/metrics.jsonl"
    before = metrics.read_bytes()

    done = copy.run(EXPORT, config=evaluated)

    assert "rule train" not in done.text.partition("Updating checkpoint dependencies")[2]
    assert metrics.read_bytes() == before
    assert copy.plan(EXPORT, config=evaluated).nothing
    copy.run("data/ckpts/chat-tiny/hf/model_iter_6", config=evaluated)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows if "validation lm loss" in row] == [6]


def test_an_equal_rebuild_plans_nothing_after_it(copy):
    shutil.rmtree(copy.folder / "data/analysis/talk")
    shutil.rmtree(copy.folder / SHARD)

    assert copy.plan(EXPORT, config=SMALL).nothing
    assert copy.plan(SHARD, config=SMALL).jobs == [f"index {SHARD}"]
    copy.run(SHARD, "data/analysis/talk", config=SMALL)
    assert copy.plan(EXPORT, config=SMALL).nothing


def test_with_a_later_artifact_whole_nothing_before_it_is_missed(copy):
    for gone in ("raw", "processed", "tokenizers", "megatron_format", "analysis", "models"):
        shutil.rmtree(copy.folder / "data" / gone)
    for gone in copy.folder.glob("data/ckpts/chat-tiny/iter_*"):
        shutil.rmtree(gone)

    assert copy.plan(EXPORT, config=SMALL).nothing
    (copy.folder / "data/ckpts/chat-tiny/schedule.json").unlink()
    assert copy.plan(EXPORT, config=SMALL).nothing


def test_what_the_data_make_illegal_stops_before_any_training(copy):
    shutil.rmtree(copy.folder / "data/ckpts")
    shutil.rmtree(copy.folder / "data/analysis/talk")

    done = copy.snakemake("--cores", "2", "data/ckpts/chat-tiny/hf/model_iter_3", config=SMALL)

    assert done.code == 1
    assert "iteration 3 of run chat-tiny is never saved: it saves every 2 iterations" in done.text
    assert "nearest: 2 or 4" in done.text
    assert "train" not in done.rules
    assert not list(copy.folder.glob("data/ckpts/chat-tiny/iter_*"))


NEXT = "data/ckpts/chat-tiny/hf/model_iter_6"
WITHOUT_A_SHARD = {
    "nothing": ((EXPORT,), overlay(), {}),
    "an export anew": ((EXPORT, "-R", "export"), overlay(), {"export": 1}),
    "training anew": ((EXPORT, "-R", "train"), overlay(), {"index": 1, **AFTER_INDEX}),
    "another lr": ((EXPORT,), overlay("runs", "chat-tiny", lr=0.25), {"index": 1, **AFTER_INDEX}),
    "other weights": (
        (EXPORT,),
        overlay("raw_hf", "Mistral-tiny", seed=7),
        {"model": 2, "index": 1, **AFTER_INDEX, **AFTER_MODEL},
    ),
    "the next": ((NEXT,), overlay(), {"index": 1, **AFTER_INDEX, "train": 3}),
}


@pytest.mark.parametrize("name", WITHOUT_A_SHARD)
def test_who_trains_has_a_shard_that_is_gone_though_only_its_analysis_names_it(name, copy):
    shutil.rmtree(copy.folder / SHARD)
    words, config, rules = WITHOUT_A_SHARD[name]

    assert copy.plan(*words, config=config).rules == rules


def test_another_shard_is_counted_and_trained_on(copy):
    manifest = copy.folder / SHARD / "plait.json"
    manifest.write_text(f"{manifest.read_text()} ")

    assert copy.plan(EXPORT, config=SMALL).rules == AFTER_INDEX
