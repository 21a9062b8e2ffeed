"""What can never exist fails in planning, with a sentence that says what is legal."""

import pytest

KNOWN = {"runs": {"chat-tiny": {"epochs": None, "train_iters": 1525}}}

REFUSALS = {
    "run": (
        "data/ckpts/nope/hf/model_iter_100",
        {},
        "no run 'nope'",
        "known: chat-tiny, llava-jp-tiny-stage1",
    ),
    "dataset": ("data/raw/nope", {}, "no dataset 'nope'", "known: dialogues, emoji"),
    "shard": ("data/processed/emoji/shard_00003.jsonl.gz", {}, "shards 00000 to 00002", "00003 is beyond"),
    "format": ("data/megatron_format/nope_emoji_pack256/shard_00000", {}, "no format 'nope'", "mmistral"),
    "mixture": ("data/analysis/nope", {}, "no mixture 'nope'", "known: captions, english"),
    "tokenizer": ("data/tokenizers/nope", {}, "no tokenizer 'nope'", "mistral-solo"),
    "hf model": ("data/models/raw_hf/nope", {}, "no raw_hf 'nope'", "MultimodalMistral-tiny"),
    "model": ("data/models/raw/nope-megatron", {}, "no model 'nope'", "chat-tiny, llava-jp-tiny"),
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


def test_a_folder_where_the_short_form_would_be_linked_is_refused_by_name(project):
    mine = project.write("ckpts/chat-tiny/hf/model_iter_100/thesis.tex", "years")
    short = "ckpts/chat-tiny/hf/model_iter_100"

    for words in ((short,), ("-R", "short", "--", short)):
        text = project.refusal(*words)
        assert f"{short} stands where plait would put a link to data/{short}" in text
    assert mine.read_text() == "years"


def test_a_link_is_no_reason_to_refuse_the_short_form(project):
    short = project.folder / "ckpts/chat-tiny/hf/model_iter_100"
    short.parent.mkdir(parents=True)
    short.symlink_to("../../../data/ckpts/chat-tiny/hf/model_iter_100")

    assert project.plan("ckpts/chat-tiny/hf/model_iter_100").rules["short"] == 1


@pytest.mark.parametrize("asked", ["jsonl.gz", "ledger.json"])
def test_a_shard_that_plait_did_not_make_is_refused_by_name(asked, project):
    mine = project.write("data/processed/emoji/shard_00000.jsonl.gz", "years")

    text = project.refusal(f"data/processed/emoji/shard_00000.{asked}")

    assert "data/processed/emoji/shard_00000.jsonl.gz stands where plait would write" in text
    assert mine.read_text() == "years"


def test_a_checkpoint_that_plait_did_not_make_is_refused_before_any_training(project):
    mine = project.write("data/ckpts/chat-tiny/iter_0000100/weights.pt", "days")

    for target in ("iter_0000100/plait.json", "hf/model_iter_100", "iter_0000150/plait.json"):
        text = project.refusal(f"data/ckpts/chat-tiny/{target}")
        assert "data/ckpts/chat-tiny/iter_0000100 stands where plait would write" in text
    assert mine.read_text() == "days"


def test_a_checkpoint_whose_manifest_snakemake_took_away_is_trained_again(project):
    project.write("data/ckpts/chat-tiny/iter_0000100/run.json", "{}")

    assert project.plan("data/ckpts/chat-tiny/iter_0000100/plait.json").rules["train"] == 2


def test_a_refusal_shows_no_line_of_the_workflow(empty_project):
    for target, config in (("data/raw/nope", {}), ("all", {"runs": {"chat-tiny": {"learning_rate": 1}}})):
        assert "common.smk" not in empty_project.refusal(target, config=config)


GRID = "data/models/sharded/{model}-megatron-tp{tp}-pp{pp}"
UNMADE = {
    "data/ckpts/chat-tiny/iter_0000100": "ask for data/ckpts/chat-tiny/iter_0000100/plait.json",
    "data/ckpts/chat-tiny": "ask for data/ckpts/chat-tiny/iter_0000100/plait.json or data/ckpts/chat-tiny/hf",
    "data/models/sharded/solo-tiny-megatron-tp0-pp1": f"nearest: {GRID} (tp is a number from 1",
    "ckpts/chat-tiny/hf/model_iter_0100": "nearest: data/ckpts/{run}/hf/model_iter_{step} (step is a number",
    "data/ckpts/chat-tiny/iter_100": "nearest: data/ckpts/{run}/iter_{iteration} (iteration is seven digits)",
    "data/processed/emoji/shard_0.jsonl.gz": "nearest: data/processed/{dataset}/shard_{shard}.jsonl.gz",
    "data/model/x": "is not the path of an artifact\n",
}


@pytest.mark.parametrize("target", UNMADE)
def test_a_target_that_no_rule_makes_says_what_to_ask_for(target, empty_project):
    text = empty_project.refusal(target)

    assert UNMADE[target] in text
    assert "MissingRule" not in text


@pytest.mark.parametrize("target", ["data/logs/x", "data/benchmarks/x", "notes/x"])
def test_what_lies_beside_artifacts_is_left_to_snakemake(target, empty_project):
    assert f"No rule to produce {target}" in empty_project.refusal(target)


@pytest.mark.parametrize("target", ["data/logs/raw/emoji.log", "data/raw/emoji/plait.json", "data/raw/emoji"])
def test_what_a_rule_makes_is_planned_without_a_warning(target, empty_project):
    done = empty_project.plan(target)

    assert done.rules == {"raw": 1}
    assert "Error" not in done.text


def test_a_source_that_is_not_there_is_named(project):
    gone = {"datasets": {"mine": {"source": {"kind": "chat-jsonl", "path": "/no/where.jsonl"}}}}

    text = project.refusal("data/processed/mine/shard_00000.jsonl.gz", config=gone)

    assert "datasets.mine.source.path: /no/where.jsonl does not exist" in text
