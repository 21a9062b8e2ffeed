"""Repeated samples of packed data: rejected within a shard, counted over shards, leaks refused by name."""

import json
from pathlib import Path

import pytest
from talks import STORY
from test_build import chats, index, turn

from plait import files
from plait.data import prints
from plait.errors import DataError
from plait.layout import Indexed
from plait.tokens import build, repeats
from plait.train import intact


def talk(text):
    return (turn("user", "Tell me."), turn("assistant", text))


def test_ids_that_came_before_are_rejected_with_the_place_of_the_first(tokenizers, tmp_path):
    source = chats(tmp_path / "a.gz", talk("one"), talk("two"), talk("three"))
    again = chats(tmp_path / "b.gz", talk("four"))
    doubled = tmp_path / "c.jsonl"
    doubled.write_text("".join(json.dumps({"id": "x", "messages": talk(word)}) + "\n" for word in ("a", "b")))
    shard = index(tmp_path / "i", tokenizers["chatml"], [source, again, doubled], template="chatml")

    assert shard.facts["rejected"] == {"duplicate_id": 1}
    assert shard.facts["documents"] == 5
    (line,) = map(json.loads, (tmp_path / "i/rejects.jsonl").read_text().splitlines())
    assert (line["line"], line["message"]) == (2, f"{doubled} line 1 has the same id")


@pytest.mark.parametrize("policy", ["count", "reject"])
def test_equal_records_are_counted_or_rejected(tokenizers, tmp_path, policy):
    source = chats(tmp_path / "a.gz", talk("one"), talk("two"), talk("one"), talk("one"))
    folder = tmp_path / "i"
    folder.mkdir()
    form = {"tokenizer": "chatml", "template": "chatml", "packing": "best_fit", "overlong": "split",
            "pictures": "encoded", "patch_size": 32, "max_resolution": 64, "reject_limit": 0.5,
            "no_loss": "reject"}  # fmt: skip
    facts = build.build(folder, tokenizers["chatml"], [source], form, 64, {"duplicates": policy})

    assert facts["duplicates"] == 2
    assert facts["rejected"] == ({"duplicate": 2} if policy == "reject" else {})
    assert len(prints.Printed(folder)) == facts["documents"] == (2 if policy == "reject" else 4)


def shards(root, dataset, *several):
    """Folders of prints as the index stage leaves them, one for each list of ids and texts."""
    found = []
    for number, said in enumerate(several):
        shard = Indexed(format="f", dataset=dataset, seq=64, shard=number)
        Path(str(shard)).mkdir(parents=True)
        with prints.Prints(Path(str(shard))) as out:
            samples = [
                (build.chat.parse(json.dumps(talk(text))), f"{dataset}/{id_}") for id_, text in said.items()
            ]
            out.extend(prints.rows(samples), [id_ for _, id_ in samples])
        found.append(shard)
    return found


def numbered(first, last):
    return {f"s-{n}": f"the {n}th tale is of {n * n} ships and {n + 7} whales" for n in range(first, last)}


def test_repeats_over_shards_are_counted_by_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = shards(
        tmp_path, "one", numbered(0, 9) | {"x": STORY}, {"y": STORY, "z": STORY.replace("wet", "dry")}
    )
    two = shards(tmp_path, "two", numbered(0, 4))
    found = repeats.of_packs(tmp_path, [*one, *two])

    assert found == files.read_json(tmp_path / repeats.DUPLICATES)
    assert found["datasets"]["one"] == {
        "samples": 12, "equal_ids": 0, "equal_samples": 1, "similar_samples": 1, "equal_texts": 1,
        "similar_texts": 1, "equal_pictures": 0, "similar_pictures": 0,
    }  # fmt: skip
    assert found["datasets"]["two"]["samples"] == 4
    assert not any(number for key, number in found["datasets"]["two"].items() if key != "samples")
    assert found["all"] == {
        "samples": 16, "equal_samples": 5, "similar_samples": 1, "equal_texts": 5, "similar_texts": 1,
        "equal_pictures": 0, "similar_pictures": 0,
    }  # fmt: skip
    assert "all" not in repeats.of_packs(tmp_path, one)


def test_one_id_in_two_shards_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = shards(tmp_path, "d", numbered(0, 5), numbered(4, 8))
    with pytest.raises(DataError, match="1 samples of d have ids that others have, in other shards: d/s-4"):
        repeats.of_packs(tmp_path, both)


@pytest.mark.parametrize("limit", [0.0, 0.19, 0.2, 1.0])
def test_what_is_evaluated_and_trained_is_named_and_limited(tmp_path, monkeypatch, caplog, limit):
    monkeypatch.chdir(tmp_path)
    train = shards(tmp_path, "train", numbered(0, 6), {"a": STORY, "b": "Only here."})
    held = numbered(20, 28) | {"c": STORY, "e": STORY.replace("wet", "dry")}
    folder = Path("data/analysis/e")
    folder.mkdir(parents=True)
    files.write_manifest(folder, kind="analysis", settings={"mixture": {"leak_limit": limit}})
    train, evaluated = (
        [(Path(str(one)), 1.0) for one in several] for several in (train, shards(tmp_path, "held", held))
    )
    caplog.set_level("INFO")
    if limit < 0.2:
        words = "2 of 10 samples .* train too, .*held/c is equal to train/a; held/e is similar to train/a"
        with pytest.raises(DataError, match=words):
            intact.check_leaks(train, evaluated, folder, tmp_path / "leaks.jsonl")
    else:
        intact.check_leaks(train, evaluated, folder, tmp_path / "leaks.jsonl")
    assert [*map(json.loads, (tmp_path / "leaks.jsonl").read_text().splitlines())] == [
        {"id": "held/c", "like": "equal", "train": "train/a"},
        {"id": "held/e", "like": "similar", "train": "train/a"},
    ]
    assert "of 10 samples that validate, 1 train too and 1 are like one that trains" in caplog.text


def test_shards_of_others_are_named_where_leaks_are_looked_for(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    ours = [Path(str(one)) for one in shards(tmp_path, "one", numbered(0, 3))]
    theirs = Path("data/megatron_format/f_theirs_pack64/shard_00000")
    files.write_manifest(tmp_path / "analysis", kind="analysis", settings={}, facts={})
    shards_ = [(ours[0], 0.5), (theirs, 0.5)]
    intact.check_leaks(shards_, [(ours[0], 1.0)], tmp_path / "analysis", tmp_path / "leaks.jsonl")

    assert (
        f"1 of 2 shards were packed by others: whether samples of them train and are evaluated too is not "
        f"known: {theirs}" in caplog.text
    )
