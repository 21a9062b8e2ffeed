"""A dry run lists exactly the missing artifacts."""

import os
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"
SOLO_7B = {"runs": {"solo-tiny": {"epochs": None, "train_iters": 1525}}}
BY_EPOCH = {"runs": {"chat-tiny": {"save_interval": None, "save_every": "epoch"}}}
JOINT = {
    "datasets": {"both": {"pack_together": ["dialogues", "more"], "shards": 2},
                 "more": {"source": {"kind": "chatterbot-dialogues", "languages": ["english"]}, "shards": 2}},
}  # fmt: skip

IN_PARTS = {"models": {"solo-tiny": {"conversion_jobs": 3}}}

TARGETS = {
    "all": ((), None),
    "raw": (("data/raw/emoji",), None),
    "chat": (("data/processed/emoji/shard_00001.jsonl.gz",), None),
    "tokenizer": (("data/tokenizers/mistral-solo",), None),
    "indexed": (("data/megatron_format/mmistral_emoji_pack256/shard_00002",), None),
    "indexed-jointly": (("data/megatron_format/chatml_both_pack512/shard_00001",), JOINT),
    "analysis": (("data/analysis/captions",), None),
    "hf-model": (("data/models/raw_hf/MultimodalMistral-tiny",), None),
    "megatron-model": (("data/models/raw/solo-tiny-megatron",), None),
    "sharded-model": (("data/models/sharded/solo-tiny-megatron-tp2-pp2",), None),
    "sharded-model-in-parts": (("data/models/sharded/solo-tiny-megatron-tp2-pp2",), IN_PARTS),
    "proof-of-a-sharded-model": (
        ("data/verify/models/sharded/chat-tiny-megatron-tp1-pp2/parity.json",),
        None,
    ),
    "proof-of-an-iteration": (("data/verify/ckpts/chat-tiny/iter_0000050/parity.json",), None),
    "schedule": (("data/ckpts/chat-tiny/schedule.json",), None),
    "iteration": (("data/ckpts/chat-tiny/iter_0000150/plait.json",), None),
    "iteration-by-epoch": (("data/ckpts/chat-tiny/iter_0000152/plait.json",), BY_EPOCH),
    "last-iteration-of-1525": (("data/ckpts/solo-tiny/iter_0001525/plait.json",), SOLO_7B),
    "export": (("data/ckpts/chat-tiny/hf/model_iter_100",), None),
    "short-export": (("ckpts/solo-tiny/hf/model_iter_100",), None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_golden_plan(name, empty_project):
    targets, config = TARGETS[name]
    golden = GOLDENS / f"{name}.txt"

    text = "\n".join(empty_project.plan(*targets, config=config).jobs) + "\n"

    if os.environ.get("REWRITE_GOLDENS"):
        golden.write_text(text)
    assert text == golden.read_text(), "the plan changed; `make goldens` rewrites it"


def test_goldens_are_of_these_targets():
    assert {path.stem for path in GOLDENS.glob("*.txt")} == set(TARGETS)


def test_the_slurm_profile_plans_the_same_from_the_short_form(empty_project):
    done = empty_project.snakemake("--profile", "slurm", "ckpts/solo-tiny/hf/model_iter_100", "-n")

    assert done.code == 0, done.text
    assert done.jobs == (GOLDENS / "short-export.txt").read_text().splitlines()
    assert "profiles slurm and workflow specific profile profiles/default" in done.text


def test_planning_imports_neither_torch_nor_what_trains(empty_project):
    done = empty_project.snakemake("-n", "--cores", "2", start=("-X", "importtime", "-m", "snakemake"))

    modules = {
        line.rpartition("|")[2].strip().split(".")[0] for line in done.text.splitlines() if "|" in line
    }
    assert "plait" in modules
    assert not modules & {"torch", "transformers", "megatron", "tokenizers", "safetensors"}
