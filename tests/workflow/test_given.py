"""What stands elsewhere and is named by an absolute path: linked at its target, checked, never touched."""

import gzip
import json
import shutil

import pytest
from projects import contents
from talks import exchange, tar_of

from plait import files
from plait.data import webdataset
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

HF, CUT = "data/models/raw_hf/mine", "data/models/sharded/mine-megatron-tp2-pp1"
OLD, SHARD = "data/ckpts/old/iter_0000007", "data/processed/talk/shard_00000.jsonl.gz"
PACKED, TARS = "data/megatron_format/chatml_talk_pack64/shard_00000", "data/energon/cor"
RUN = {"recipe": "chat", "model": "mine", "mixture": "some", "train_iters": 20, "save_interval": 10}
CONFIG = {
    "raw_hf": {"mine": {"kind": "folder", "path": HF}},
    "datasets": {
        "talk": {"source": {"kind": "chat-jsonl", "path": "/gone"}},
        "cor": {
            "source": {"kind": "tars", "path": "/gone"},
            "energon": {"layout": "question_answer", "split": [1, 1, 0]},
        },
    },
    "tokenizers": {"mine": {"kind": "folder", "path": HF}},
    "formats": {"plain": {"tokenizer": "mine", "template": "chatml"}},
    "mixtures": {
        "some": {"format": "plain", "pack": 64, "datasets": ["dialogues"]},
        "talk": {"format": "chatml", "pack": 64, "datasets": ["talk"]},
        "cor": {"format": "alpaca", "decoder_seq_length": 64, "datasets": ["cor"]},
    },
    "runs": {
        "old": {**RUN, "tensor_model_parallel_size": 2},
        "next": {**RUN, "start_run": "old", "start_iteration": 7},
    },
}
ASKED = {
    CUT: (f"data/verify/{CUT[5:]}/parity.json", {"verify_sharded": 1}),
    OLD: ("data/ckpts/old/hf/model_iter_7", {"export": 1}),
    SHARD: (PACKED, {"index": 1, "tokenizer": 2}),
    TARS: ("data/analysis/cor", {"analyse": 1, "tokenizer": 2}),
}
"""What follows from each thing that is given, and the rules that it still needs."""


def others(target, folder, maker):
    """What somebody else left in a folder, to stand for this target."""
    if target == CUT:
        shutil.copytree(maker.shards(maker.hf(), 2, 1), folder)
    elif target == OLD:
        from makers import save

        folder.mkdir()
        run_ranks(save, Grid(2, 1), maker.shards(maker.hf(), 2, 1), Grid(2, 1), folder)
    elif target == SHARD:
        said = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"}]
        folder.with_suffix(".gz").write_bytes(gzip.compress(json.dumps(said).encode()))
        return folder.with_suffix(".gz")
    else:
        for shard in range(2):
            parts = webdataset.to_parts(exchange(shard, str(shard)), "question_answer")
            tar_of(folder / f"part/{shard}.tar", [(str(shard), parts)])
    return folder


@pytest.mark.parametrize(
    "target", [pytest.param(one, marks=[pytest.mark.long] * (one == CUT)) for one in ASKED]
)
def test_it_is_linked_checked_and_used_and_stays_as_it_is(target, project, adopt, put, maker, tmp_path):
    asked, rules = ASKED[target]
    put(maker.hf(), HF)
    elsewhere = others(target, tmp_path / "others", maker)
    before = contents(tmp_path / "others") if elsewhere.is_dir() else elsewhere.read_bytes()
    config = {**CONFIG, "given": {target: str(elsewhere)}}
    assert adopt(HF, config=config)[0] == 0
    text = project.refusal(asked, config=config)
    assert f"{target} is given in config/, as {elsewhere}, and was not adopted yet" in text
    assert f"hint:  plait adopt {target}" in text

    status, said = adopt(target, config=config)

    assert status == 0, said
    assert project.plan(asked, config=config).rules == rules
    if target in {CUT, SHARD}:
        project.run(asked, config=config)
        assert project.plan(asked, config=config).nothing
    assert (contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()) == before
    assert "was adopted already" in adopt(target, config=config)[1]


def test_a_run_starts_from_a_checkpoint_that_is_given(project, adopt, put, maker, tmp_path):
    put(maker.hf(), HF)
    config = {**CONFIG, "given": {OLD: str(others(OLD, tmp_path / "others", maker))}}
    assert adopt(HF, OLD, config=config)[0] == 0

    rules = project.plan("data/ckpts/next/iter_0000010/plait.json", config=config).rules

    assert rules["train"] == rules["export"] == rules["verify_iteration"] == 1
    assert not {"convert", "shard"} & rules.keys()


def test_what_is_refused_leaves_no_link(project, adopt, put, maker, tmp_path):
    put(maker.hf(), HF)
    wrong = others(CUT, tmp_path / "others", maker)
    shutil.rmtree(wrong / "release/mp_rank_01")
    before = contents(wrong)
    config = {**CONFIG, "given": {CUT: str(wrong), SHARD: "/nowhere/at/all.gz"}}
    assert adopt(HF, config=config)[0] == 0

    status, said = adopt(CUT, config=config)
    assert status == 2
    assert "mp_rank_01" in said
    assert not (project.folder / CUT).exists()
    assert contents(wrong) == before
    assert "there is nothing at /nowhere/at/all.gz" in adopt(SHARD, config=config)[1]
    project.write(f"{CUT}/mine", "")
    assert f"{CUT} stands already, and config/ has {wrong} given" in adopt(CUT, config=config)[1]
    assert (project.folder / CUT / "mine").is_file()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({CUT: "others"}, "'others' is not an absolute path"),
        ({"data/ckpts/old/hf/model_iter_7": "/a"}, "is made here and never given"),
        ({"data/else": "/a"}, "is not the path of an artifact"),
    ],
)
def test_a_key_that_nothing_can_heed_is_refused(given, sentence, project):
    assert sentence in project.refusal(HF, config={**CONFIG, "given": given})


def test_the_manifest_of_another_project_is_not_believed(project, adopt, put, maker, tmp_path):
    put(maker.hf(), HF)
    elsewhere = others(CUT, tmp_path / "others", maker)
    (elsewhere / "plait.json").write_text("{}")
    config = {**CONFIG, "given": {CUT: str(elsewhere)}}

    status, said = adopt(HF, CUT, config=config)

    assert status == 0, said
    assert files.check_manifest(project.folder / CUT)["adopted"]
    assert (elsewhere / "plait.json").read_text() == "{}"
