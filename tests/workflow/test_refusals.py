"""What can never exist fails in planning, with a sentence that says what is legal."""

import pytest

KNOWN = {"runs": {"chat-tiny": {"epochs": None, "train_iters": 1525}}}

REFUSALS = {
    "run": ("data/ckpts/nope/hf/model_iter_100", {}, "no run 'nope'", "known: chat-tiny, solo-tiny"),
    "dataset": ("data/raw/nope", {}, "no dataset 'nope'", "known: dialogues, emoji"),
    "shard": ("data/processed/emoji/shard_00003.jsonl.gz", {}, "shards 00000 to 00002", "00003 is beyond"),
    "format": ("data/megatron_format/nope_emoji_pack256/shard_00000", {}, "no format 'nope'", "mmistral"),
    "mixture": ("data/analysis/nope", {}, "no mixture 'nope'", "known: captions, talk"),
    "tokenizer": ("data/tokenizers/nope", {}, "no tokenizer 'nope'", "mistral-solo"),
    "hf model": ("data/models/raw_hf/nope", {}, "no raw_hf 'nope'", "MultimodalMistral-tiny"),
    "model": ("data/models/raw/nope-megatron", {}, "no model 'nope'", "chat-tiny, solo-tiny"),
    "tp": ("data/models/sharded/solo-tiny-megatron-tp3-pp1", {}, "not a multiple of tp 3", "tp may be 1, 2"),
    "pp": ("data/models/sharded/solo-tiny-megatron-tp1-pp3", {}, "not a multiple of pp 3", "1, 2, 4"),
    "grid of a run": (
        "data/ckpts/chat-tiny/hf/model_iter_100",
        {"runs": {"chat-tiny": {"tensor_model_parallel_size": 4}}},
        "not a multiple of tp 4",
        "tp may be 1, 2",
    ),
    "iteration": (
        "ckpts/chat-tiny/hf/model_iter_120",
        KNOWN,
        "iteration 120 of run chat-tiny is never saved",
        "50, 100, 150, ..., 1500, 1525",
    ),
    "iteration beyond": ("data/ckpts/chat-tiny/hf/model_iter_1550", KNOWN, "never saved", "1500 or 1525"),
    "key": ("data/raw/emoji", {"runs": {"chat-tiny": {"learning_rate": 1}}}, "no such key", "config/README"),
    "value": (
        "data/raw/emoji",
        {"runs": {"chat-tiny": {"micro_batch_size": 0}}},
        "runs.chat-tiny",
        "greater",
    ),
    "name": (
        "data/raw/emoji",
        {"runs": {"chat-tiny": {"mixture": "x"}}},
        "runs.chat-tiny.mixture",
        "captions",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_in_planning(name, empty_project):
    target, config, found, legal = REFUSALS[name]

    text = empty_project.refusal(target, config=config)

    assert found in text
    assert legal in text


def test_a_folder_that_plait_did_not_make_is_refused_by_name(project):
    mine = project.write("data/models/raw_hf/Mistral-tiny/config.json", "{}")

    for target in ("data/models/raw_hf/Mistral-tiny", "data/models/raw/chat-tiny-megatron"):
        text = project.refusal(target)
        assert "data/models/raw_hf/Mistral-tiny stands where plait would write" in text
    assert mine.read_text() == "{}"


def test_a_source_that_is_not_there_is_named(project):
    gone = {"datasets": {"mine": {"source": {"kind": "chat-jsonl", "path": "/no/where.jsonl"}}}}

    text = project.refusal("data/processed/mine/shard_00000.jsonl.gz", config=gone)

    assert "datasets.mine.source.path: /no/where.jsonl does not exist" in text
