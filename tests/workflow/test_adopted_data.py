"""Data of others, standing where plait would write them."""

import gzip
import json

import pytest
import yaml
from projects import contents
from talks import exchange, tar_of

from plait import files, layout
from plait.cli import adopt as adopt_command
from plait.data import energon, meta, webdataset

SHARDS = [f"data/processed/mine/shard_{n:05d}.jsonl.gz" for n in range(2)]
TARS = "data/energon/cor"
KEYS = {"layout": "question_answer", "split": [4, 1, 0]}
CONFIG = {
    "datasets": {
        "mine": {"source": {"kind": "chat-jsonl", "path": "/gone"}, "shards": 2},
        "cor": {"source": {"kind": "tars", "path": "/gone"}, "energon": KEYS},
    },
    "mixtures": {
        "mine": {"format": "chatml", "pack": 64, "datasets": ["mine"]},
        "cor": {"format": "alpaca", "decoder_seq_length": 64, "datasets": ["cor"]},
    },
}


def record(text):
    return json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}])


def own_shards(project, *lines):
    for path in SHARDS:
        project.write(path, "")
        (project.folder / path).write_bytes(gzip.compress("\n".join(lines).encode()))


def test_own_chat_records_are_read_and_packed(project, adopt):
    own_shards(project, record("one"), record("two"))
    text = project.refusal("data/analysis/mine", config=CONFIG)
    assert f"{SHARDS[0]} stands where plait would write" in text
    assert f"`plait adopt {SHARDS[0]}`" in text
    before = contents(project.folder / "data")

    status, said = adopt(*SHARDS, config=CONFIG)

    assert status == 0, said
    assert before.items() <= contents(project.folder / "data").items()
    assert project.plan(SHARDS[0], config=CONFIG).nothing
    rules = project.plan("data/analysis/mine", config=CONFIG).rules
    assert rules == {"analyse": 1, "index": 2, "tokenizer": 2}
    indexed = "data/megatron_format/chatml_mine_pack64/shard_00000"
    project.run(indexed, config=CONFIG)
    assert files.read_manifest(project.folder / indexed)["facts"]["read"] == 2
    assert project.plan(indexed, config=CONFIG).nothing

    made = files.read_manifest(project.folder / indexed)
    (project.folder / indexed / "plait.json").unlink()
    assert adopt(indexed, config=CONFIG)[0] == 0
    taken = files.check_manifest(project.folder / indexed)
    assert (taken["facts"], taken["files"]) == (made["facts"], made["files"])
    (project.folder / indexed / "plait.json").unlink()
    stats = project.folder / indexed / "data_stats.json"
    stats.write_text(stats.read_text().replace(f'"packs": {made["facts"]["packs"]}', '"packs": 99'))
    assert "expected: 99 packs" in adopt(indexed, config=CONFIG)[1]


def test_a_raw_source_whose_own_path_is_gone_is_read_where_it_stands(project, adopt):
    project.write("data/raw/mine/talks.jsonl", f"{record('one')}\n{record('two')}\n")

    status, said = adopt("data/raw/mine", config=CONFIG)

    assert status == 0, said
    assert project.plan("data/raw/mine", config=CONFIG).nothing
    assert project.plan(SHARDS[0], config=CONFIG).rules == {"chat": 1}


def test_a_line_that_is_no_record_is_named(project, adopt):
    own_shards(project, record("one"), '{"role": "wizard"}')

    status, said = adopt(SHARDS[1], config=CONFIG)

    assert status == 2
    assert f"{SHARDS[1]} line 2: message 0 has role 'wizard'" in said
    assert "a source of kind chat-jsonl" in said


def test_a_shard_by_hand_goes_over_no_file_of_others(project, adopt):
    own_shards(project, record("one"))
    before = contents(project.folder / "data/processed")

    words = ("--settings", '{"shards": 2}')
    status, said = adopt("data/raw/mine", SHARDS[0], *words, command="chat", config=CONFIG)

    assert status == 2
    assert "stands where plait would write" in said
    assert contents(project.folder / "data/processed") == before


def guide_003(folder, *, prepared=""):
    """Tars of the third guide, in a folder of their own; prepared by energon as it is or as it was."""
    for shard in range(1, 6):
        samples = []
        for number in range(2):
            parts = webdataset.to_parts(exchange(number, f"{shard}{number}"), "question_answer")
            samples.append((f"{shard}{number}", parts))
        tar_of(folder / f"cor/dataset_part_{shard}.tar", samples)
    if prepared:
        fields = {"image": "jpg", **energon.QUESTION_ANSWER}
        settings = {"split": [4, 1, 0], "split_parts": {}, "exclude": ""}
        description = meta.description(meta.VQA, fields)
        energon.prepared(
            folder, energon.surveyed(folder, settings, description).counts, settings, description
        )
    if prepared == "by an older one":
        old = {"__module__": "megatron.energon", "__class__": "VQAWebdataset", "field_map": fields}
        (folder / meta.DATASET).write_text(yaml.safe_dump(old))


@pytest.mark.parametrize("prepared", ["", "by this one"])
def test_the_tars_of_guide_003_are_taken_where_they_stand(project, adopt, prepared):
    folder = project.folder / TARS
    guide_003(folder, prepared=prepared)
    before = contents(folder)
    assert f"`plait adopt {TARS}`" in project.refusal("data/analysis/cor", config=CONFIG)

    status, said = adopt(TARS, config=CONFIG)

    assert status == 0, said
    assert before.items() <= contents(folder).items()
    facts = files.check_manifest(folder)["facts"]
    assert facts["samples"] == 10
    assert facts["splits"] == {"train": 8, "val": 2, "test": 0}
    assert list(facts["shards"]) == [f"cor/dataset_part_{n}.tar" for n in range(1, 6)]
    assert len([*energon.read(folder)]) == 8
    assert project.plan(TARS, config=CONFIG).nothing
    assert project.plan("data/analysis/cor", config=CONFIG).rules == {"analyse": 1, "tokenizer": 2}


def test_tars_prepared_by_an_older_energon_are_not_changed(project, adopt):
    folder = project.folder / TARS
    guide_003(folder, prepared="by an older one")
    before = contents(folder)

    status, said = adopt(TARS, config=CONFIG)

    assert status == 2
    assert "is of an older energon than reads it here" in said
    assert "name that as a source of kind energon" in said
    assert contents(folder) == before


def test_keys_that_would_prepare_tars_anew_are_refused_where_they_are_prepared(project, adopt):
    folder = project.folder / TARS
    guide_003(folder, prepared="by this one")
    before = contents(folder)
    other = {
        **CONFIG["datasets"]["cor"],
        "energon": {**KEYS, "exclude": "part_1", "field_map": {"image": "jpg"}},
    }

    status, said = adopt(TARS, config={**CONFIG, "datasets": {**CONFIG["datasets"], "cor": other}})

    assert status == 2
    assert "is prepared already, and field_map, exclude of its energon keys would change that" in said
    assert contents(folder) == before


@pytest.mark.parametrize("lost", ["cor/dataset_part_1.tar", ".nv-meta/split.yaml"])
def test_prepared_tars_that_lost_a_part_are_refused(lost, project, adopt):
    folder = project.folder / TARS
    guide_003(folder, prepared="by this one")
    (folder / lost).unlink()
    before = contents(folder)

    status, said = adopt(TARS, config=CONFIG)

    assert status == 2
    assert (
        f"names {lost}, which is not there" if lost.endswith(".tar") else f"no {lost}: it is half"
    ) in said
    assert contents(folder) == before


def test_a_field_map_describes_tars_that_have_no_index(project, adopt):
    folder = project.folder / TARS
    guide_003(folder)
    mapped = {**CONFIG["datasets"]["cor"], "energon": {**KEYS, "field_map": {"image": "png,jpg"}}}

    status, said = adopt(TARS, config={**CONFIG, "datasets": {**CONFIG["datasets"], "cor": mapped}})

    assert status == 0, said
    fields = meta.read_yaml(folder / meta.DATASET)["field_map"]
    assert fields == {"image": "png,jpg", **energon.QUESTION_ANSWER}


def test_tars_that_energon_cannot_read_are_left_without_an_index(project, adopt):
    folder = project.folder / TARS
    guide_003(folder)
    before = contents(folder)
    wrong = {**CONFIG["datasets"]["cor"], "energon": {**KEYS, "split": [0.1, 1, 0]}}

    status, said = adopt(TARS, config={**CONFIG, "datasets": {**CONFIG["datasets"], "cor": wrong}})

    assert status == 2
    assert "the split leaves no shard for training" in said
    assert contents(folder) == before


def test_what_is_half_prepared_or_only_a_pointer_is_named(project, adopt):
    folder = project.folder / TARS
    guide_003(folder)
    index = project.write(f"{TARS}/cor/dataset_part_1.tar.idx", "")
    assert "has cor/dataset_part_1.tar.idx and no .nv-meta/dataset.yaml" in adopt(TARS, config=CONFIG)[1]
    index.unlink()
    (folder / "cor/dataset_part_2.tar").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"hint:  git -C {folder / 'cor'} lfs pull" in adopt(TARS, config=CONFIG)[1]


INSTEAD = {
    "data/raw/cor": "move it to a folder of your own and name that in datasets.cor.source",
    "data/hub/models--us--tiny/main.json": "the hub is asked again",
    "data/tokenizers/mine": "name that in tokenizers.mine",
    "data/ckpts/chat-tiny": "adopt its checkpoints, data/ckpts/chat-tiny/iter_NNNNNNN",
    "data/ckpts/chat-tiny/hf/model_iter_100": "data/models/raw_hf/NAME",
    "data/megatron_format/chatml_mine_pack64/shard_00000": "has no data_stats.json",
}


@pytest.mark.parametrize("path", INSTEAD)
def test_what_is_not_adopted_says_what_to_do_instead(path, project, adopt):
    project.write(path if path.endswith(".json") else f"{path}/file", "mine")
    project.write("data/tokenizers/mistral-chatml/plait.json", "{}")

    status, said = adopt(path, config=CONFIG)

    assert status == 2
    assert INSTEAD[path] in said


def test_every_kind_is_adopted_or_says_what_to_do_instead():
    assert set(adopt_command.INSTEAD) == set(layout.KINDS) - set(layout.ADOPTABLE)
