"""Shards that one job makes together: the bytes of single jobs, whatever happens in between."""

import json

import pytest
import yaml
from projects import contents

from plait import files, layout
from plait.cli.main import main
from plait.config import Plan, load
from plait.config.batches import Batches
from plait.data import shards

SHARDS = 7
CONFIG = {
    "datasets": {
        "talk": {
            "source": {"kind": "chat-jsonl", "path": "records.jsonl"},
            "shards": SHARDS,
            "shards_per_job": 3,
        },
    },
    "tokenizers": {
        "base": {"kind": "package", "package": "mistral_common", "file": "data/tokenizer.model.v1"},
    },
    "formats": {"plain": {"tokenizer": "base", "template": "mistral"}},
    "mixtures": {"all": {"format": "plain", "pack": 64, "datasets": ["talk"]}},
}
RAW, BATCH = "data/raw/talk", "data/processed/talk/.batches/00000-00004.json"


def plan(**keys):
    return Plan(load(CONFIG | {"datasets": {"talk": CONFIG["datasets"]["talk"] | keys}}))


def chat(number):
    return layout.Chat(dataset="talk", shard=number)


def talk(number):
    said = {"user": f"question {number}", "assistant": f"answer {number}"}
    return [{"role": role, "content": text} for role, text in said.items()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project with a raw source and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(yaml.safe_dump(CONFIG))
    lines = [json.dumps(talk(n)) for n in range(21)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    assert main(["raw", RAW]) == 0
    return tmp_path


def made(folder):
    """What was made, without batches."""
    found = contents(folder / "data")
    return {path.removeprefix(str(folder)): it for path, it in found.items() if "/.batches/" not in path}


def test_a_batch_has_the_bytes_of_single_jobs(place, tmp_path_factory, monkeypatch):
    indexed = "data/megatron_format/plain_talk_pack64"
    assert main(["tokenizer", "data/tokenizers/base"]) == 0
    assert main(["chat", RAW, BATCH]) == 0
    words = ["index", "data/tokenizers/base", BATCH]
    assert main([*words, f"{indexed}/.batches/00001-00002.json"]) == 0
    together = made(place)
    for one in [*(chat(n) for n in range(5))]:
        files.remove(place / str(one))
        assert main(["chat", RAW, str(one)]) == 0
    for n in (1, 2):
        target = f"{indexed}/shard_{n:05d}"
        files.remove(place / target)
        assert main(["index", "data/tokenizers/base", str(chat(n)), target]) == 0

    assert made(place) == together
    assert len([path for path in together if "/processed/" in path]) == 15


def test_a_job_that_dies_loses_the_shard_that_it_was_at(place, monkeypatch):
    write, done = shards.write, []

    def dies(raw, shard, settings):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard)
        return write(raw, shard, settings)

    monkeypatch.setattr(shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        main(["chat", RAW, BATCH])
    assert not (place / BATCH).exists()
    before = {path: path.stat().st_mtime_ns for path in place.glob("data/processed/talk/shard_*")}
    assert len(before) == 2 * 3

    monkeypatch.setattr(shards, "write", lambda *args: done.append(args[1]) or write(*args))
    assert main(["chat", RAW, BATCH]) == 0

    assert done == [chat(n) for n in range(5)]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert [*files.read_json(BATCH)["shards"]] == [str(chat(n)) for n in range(5)]


@pytest.mark.parametrize("harm", ["cut", "settings", "raw"])
def test_only_shards_that_stand_as_they_are_to_be_are_kept(harm, place):
    assert main(["chat", RAW, BATCH]) == 0
    whole = contents(place / "data/processed")
    path = place / chat(2).manifest
    if harm == "cut":
        (place / str(chat(2))).write_bytes(b"")
    else:
        found = json.loads(path.read_text())
        found["settings" if harm == "settings" else "inputs"] = {}
        path.write_text(json.dumps(found))

    assert main(["chat", RAW, BATCH]) == 0

    assert contents(place / "data/processed") == whole


def test_a_shard_that_cannot_be_made_is_named(place, capsys):
    text = (place / "records.jsonl").read_text().splitlines()
    text[10] = "no record"
    (place / "records.jsonl").write_text("\n".join(text))
    assert main(["raw", RAW]) == 0

    assert main(["chat", RAW, BATCH]) == 2

    assert f"1 of 3 lines of {chat(3)} are rejected" in capsys.readouterr().err
    assert (place / chat(2).manifest).is_file()
    assert not (place / BATCH).exists()


def cut(plan, targets=()):
    """How the shards of the dataset are cut, in few words."""

    def word(one):
        return f"{one.first}-{one.last}" if isinstance(one, layout.Batch) else str(one.shard)

    return " ".join(map(word, Batches(plan, lambda: targets).cut(chat(n) for n in range(SHARDS))))


def test_shards_are_cut_as_config_says_until_they_stand(place):
    assert cut(plan()) == "0-2 3-5 6-6"
    assert cut(plan(shards_per_job=1)) == "0 1 2 3 4 5 6"
    assert cut(plan(), [chat(4).manifest]) == "0-2 3-3 4 5-5 6-6"

    for name in ("00000-00002", "00003-00005", "00006-00006"):
        assert main(["chat", RAW, f"data/processed/talk/.batches/{name}.json"]) == 0
    for number in (1, 2, 100):
        assert cut(plan(shards_per_job=number)) == "0-2 3-5 6-6"  # nothing is made from other files
    assert cut(plan(shards_per_job=2, reject_limit=0.5)) == "0-1 2-3 4-5 6-6"
    assert main(["chat", RAW, "data/processed/talk/.batches/00002-00003.json"]) == 0
    assert cut(plan()) == "0 1 2-3 4 5 6-6"  # no other batch of a shard is left


def test_single_shards_stay_single(place):
    for n in range(SHARDS):
        assert cut(plan()) == "0-2 3-5 6-6" or n > 3
        assert main(["chat", RAW, str(chat(n))]) == 0

    assert cut(plan()) == "0 1 2 3 4 5 6"
    assert cut(plan(reject_limit=0.5)) == "0-2 3-5 6-6"


def test_a_shard_of_a_batch_that_was_changed_is_noticed_when_it_is_needed(place):
    assert main(["chat", RAW, BATCH]) == 0
    batches, batch = Batches(plan()), layout.ChatBatch.parse(BATCH)
    indexed = layout.Indexed(format="plain", dataset="talk", seq=64, shard=1)
    assert batches.to_force(indexed, [batch], lambda _: None) == []

    files.remove(place / chat(4).manifest)

    assert batches.to_force(indexed, [batch], lambda _: None) == [BATCH]
    changed = Batches(plan(reject_limit=0.5))
    assert changed.to_force(chat(1), [], lambda _: None) == [chat(1).manifest]
    assert changed.to_force(chat(1), [], lambda _: "made alone") == []
    assert batches.to_force(chat(1), [], lambda _: None) == []
