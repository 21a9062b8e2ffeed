"""Datasets for energon: what is written is what energon reads, and each of its traps is a sentence."""

import contextlib
import io
import json
import logging
import sqlite3
import struct
from pathlib import Path

import pytest
import yaml
from nv_meta import through_energon
from PIL import Image
from talks import KEYS, exchange, picture, talk, tar_of

from plait.data import energon, meta, webdataset
from plait.data.chat import Message, Picture, Sample, Text
from plait.data.rejects import Record
from plait.errors import ConfigError, DataError


def build(folder, samples, **keys):
    folder.mkdir()
    return energon.build(folder, samples, {**KEYS, **keys})


@pytest.fixture(scope="module", params=["guide-002", "whole-talks"])
def made(request, tmp_path_factory):
    """A dataset that energon has read: its folder, its samples and its facts."""
    folder = tmp_path_factory.mktemp("made") / "d"
    keys = {"shard_name": "wds/pretrain-{}.tar", "samples_per_shard": 1}
    make, keys = (exchange, keys) if request.param == "guide-002" else (talk, {})
    samples = [make(number) for number in range(12)]
    return folder, samples, build(folder, samples, **keys)


def test_what_is_written_is_read_by_energon_and_by_us(made):
    folder, samples, facts = made
    one = samples[0].id == "s-0"
    names = ["wds/pretrain-0.tar", "wds/pretrain-1.tar"] if one else ["000000.tar", "000001.tar"]
    train = 10 if one else 8
    assert facts["samples"] == sum(facts["shards"].values()) == 12
    assert facts["splits"] == {"train": train, "val": 12 - train, "test": 0}
    assert set(names) < facts["shards"].keys()
    found = meta.read_yaml(folder / meta.DATASET)
    assert found.get("field_map") == ({"image": "jpg", **energon.CONVERSATION} if one else None)
    read = [*energon.read(folder), *energon.read(folder, "val")]
    assert sorted(through_energon(folder)) == sorted(sample.id for sample in energon.read(folder))
    assert sorted(read, key=lambda sample: sample.id) == sorted(samples, key=lambda sample: sample.id)


def test_seed_23_prepare_asks_nothing(made):
    """Guides 002 and 003 answer a menu by numbers, which have changed since; here nobody is there to ask."""
    folder, samples, _ = made
    found = meta.read_yaml(folder / meta.DATASET)
    name = found.get("sample_type", found)["__class__"]
    assert name == ("VQASample" if len(samples[0].pictures) == 1 else "CrudeWebdataset")


# What energon says nothing of, and what it says badly


def test_nothing_found(tmp_path):
    with pytest.raises(DataError, match="there is not one sample to write"):
        build(tmp_path / "d", [])
    with pytest.raises(DataError, match=r"e has no tar, or energon.exclude leaves all of them out"):
        build(tmp_path / "e", [exchange(0)], exclude="tar")


def test_a_wrong_field_map(tmp_path):
    fields = {"image": "jpg", **energon.CONVERSATION, "context": "json[nope]"}
    with pytest.raises(
        DataError, match=r"energon cannot read .*/d as described: .*/d/000000\.tar: sample .*nope"
    ):
        build(tmp_path / "d", [exchange(n) for n in range(8)], field_map=fields)


@pytest.mark.parametrize(
    ("make", "keys", "sentence"),
    [
        (
            talk,
            {},
            "field_map describes samples of one picture, .*; 't-0' of .*/d has more: samples are read whole",
        ),
        (exchange, {"sample_type": "CrudeWebdataset"}, "describes a VQASample, and sample_type is Crude"),
    ],
)
def test_a_field_map_that_nothing_would_heed(tmp_path, make, keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(tmp_path / "d", [make(0), make(1)], field_map={"context": "json[9][x]"}, **keys)


def test_pictures_of_any_kind_are_alternatives_of_the_field_map(tmp_path):
    """The presets name jpg, as their originals do; writing names pictures by what they are."""
    shown = Message("user", (picture(9, "PNG"), Text("\nwhat?")))
    samples = [*map(exchange, range(8)), Sample((shown, *exchange(8).messages[1:]), "png")]
    fields = {"image": "jpg", **energon.CONVERSATION}
    facts = build(tmp_path / "d", samples, field_map=fields)
    assert facts["splits"] == {"train": 8, "val": 1, "test": 0}
    assert meta.read_yaml(tmp_path / "d" / meta.DATASET)["field_map"] == fields | {"image": "jpg,png"}
    assert {sample.id for part in ("train", "val") for sample in energon.read(tmp_path / "d", part)} == {
        sample.id for sample in samples
    }


def test_a_sample_type_that_would_drop_turns(tmp_path):
    with pytest.raises(ConfigError, match=r"one question and one answer; 't-0' of .*/d has more"):
        build(tmp_path / "d", [talk(0), talk(1)], sample_type="VQASample")


def test_a_split_that_leaves_training_empty(tmp_path):
    with pytest.raises(DataError, match="leaves no shard for training: 1 shards"):
        build(tmp_path / "d", [exchange(n) for n in range(3)])


def test_split_parts_name_shards_and_leftovers_of_a_failed_prepare_do_not_matter(tmp_path):
    """Energon takes a lone index for a dataset of another kind, and an old .idx for the tar's."""
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta/index.sqlite").write_bytes(b"half")
    (tmp_path / "000000.tar.idx").write_bytes(b"old")
    parts = {"train": r"00000[01]\.tar", "val": r"000002\.tar"}
    keys = {**KEYS, "split_parts": parts, "exclude": r"000003\.tar"}
    facts = energon.build(tmp_path, [exchange(n) for n in range(16)], keys)
    assert facts["splits"] == {"train": 8, "val": 4, "test": 0}
    assert "000003.tar" not in facts["shards"]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"train": r"000000\.tar"},
            "the split of .*/d leaves 000001.tar, 000002.tar, 000003.tar out of every part",
        ),
        ({"train": r".*\.tar", "val": r"000001\.tar"}, "the split of .*/d gives 000001.tar twice"),
    ],
    ids=["lost", "overlapping"],
)
def test_split_parts_that_do_not_divide_the_shards(tmp_path, parts, sentence):
    with pytest.raises(DataError, match=sentence):
        build(tmp_path / "d", [exchange(n) for n in range(16)], split_parts=parts)


def test_shares_that_whole_shards_cannot_have_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "d", [exchange(n) for n in range(8)])
    (told,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "50% : 50% : 0% to train, val, test, not 90% : 10% : 0%" in told
    assert "lower samples_per_shard" in told


def test_shares_near_those_asked_for_are_not_worth_a_line(caplog):
    with caplog.at_level(logging.WARNING):
        energon._compare_shares({"train": 450, "val": 122, "test": 0}, (9, 1, 0), 4)
        assert not caplog.records
        energon._compare_shares({"train": 450, "val": 0, "test": 0}, (9, 1, 0), 3)
        assert len(caplog.records) == 1


def test_a_record_of_an_id_that_came_before_is_rejected_by_both_their_names(tmp_path):
    samples = [exchange(n, "twice" if n in (0, 5) else None) for n in range(6)]
    facts = energon.build(
        tmp_path, samples, KEYS | {"reject_limit": 0.2}, lambda n: Record(Path("chats"), n, "")
    )
    (entry,) = map(json.loads, (tmp_path / "rejects.jsonl").read_bytes().splitlines())

    assert (facts["samples"], facts["rejected"]) == (5, {"duplicate_id": 1})
    assert entry["line"] == 5
    assert (entry["id"], entry["message"]) == ("twice", "chats line 0 has the same id")
    with pytest.raises(DataError, match=r"1 of 6 records .* are rejected \(1 duplicate_id\)"):
        energon.build(tmp_path, samples, KEYS, lambda n: Record(Path("chats"), n, ""))


def test_a_record_that_no_layout_holds_is_named(tmp_path):
    keys = KEYS | {"layout": "question_answer"}
    with pytest.raises(
        DataError, match=r"1 of 2 .*\(1 not_one_exchange\).*chats line 1: sample 't-1' has turns"
    ):
        energon.build(tmp_path, [exchange(0), talk(1)], keys, lambda n: Record(Path("chats"), n, ""))


def turned_and_torn():
    """A photograph that decodes, whose camera's tags say which way it was held and are damaged."""
    tags, file = Image.Exif(), io.BytesIO()
    tags[0x0112], tags[0x010E] = 6, "a picture"
    Image.new("RGB", (8, 6)).save(file, "JPEG", exif=tags)
    torn = bytearray(file.getvalue())
    torn[torn.index(b"Exif") + 17] = 0
    return Picture(bytes(torn))


def test_what_no_tar_can_hold_is_written_down_counted_and_left_out(tmp_path):
    answer = Message("assistant", (Text("a"),))
    bad = {
        3: (Message("user", (picture(), Text("\nwrite <image>"))), answer),
        7: talk(7).messages,
        8: (Message("user", (Picture(b"GIF8 no more"), Text("\nwhat?"))), answer),
        11: (Message("user", (turned_and_torn(), Text("\nwhat?"))), answer),
    }
    samples = [Sample(bad.get(n, exchange(n).messages), f"s-{n}") for n in range(16)]
    keys = {"layout": "question_answer", "reject_limit": 0.25}

    facts = build(tmp_path / "d", samples, **keys)

    reasons = {"not_one_exchange": 1, "picture_in_text": 1, "undecodable_picture": 2}
    assert (facts["read"], facts["samples"], facts["rejected"]) == (16, 12, reasons)
    lines = [json.loads(line) for line in (tmp_path / "d/rejects.jsonl").read_text().splitlines()]
    assert [(line["line"], line["id"]) for line in lines] == [(n + 1, f"s-{n}") for n in bad]
    assert all(Path(line["file"]).name == "samples" and line["message"] for line in lines)
    read = [one.id for part in ("train", "val") for one in energon.read(tmp_path / "d", part)]
    assert read == [f"s-{n}" for n in range(16) if n not in bad]
    with pytest.raises(
        DataError, match=r"4 of 16 records of .*/e are rejected \(2 undecodable_picture, .* 24.00%"
    ):
        build(tmp_path / "e", samples, **keys | {"reject_limit": 0.24})


def test_if_all_is_rejected_nothing_is_made(tmp_path):
    with pytest.raises(DataError, match="there is not one sample to write"):
        build(tmp_path / "d", [talk(0)], layout="question_answer", reject_limit=1.0)


def someones(folder, *, shards=2, change=lambda shard, key, parts: (key, parts), old=True):
    """A folder as energon 2.3 prepared it: the old class name, .info.yaml, no index."""
    for shard in range(shards):
        samples = []
        for number in range(3):
            key = f"{shard}{number}"
            parts = webdataset.to_parts(exchange(number, key), "question_answer")
            samples.append(change(shard, key, parts))
        tar_of(folder / f"part_{shard}.tar", samples)
    meta = folder / ".nv-meta"
    meta.mkdir()
    fields = {"field_map": {"image": "jpg", **energon.QUESTION_ANSWER}}
    name = {"__module__": "megatron.energon", "__class__": "VQAWebdataset"}
    (meta / "dataset.yaml").write_text(yaml.safe_dump({**name, **fields} if old else fields))
    parts = {"train": ["part_0.tar"], "val": ["part_{1..2}.tar"]}
    left_out = ["part_2.tar", "part_1.tar/11"]
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": parts, "exclude": left_out}))
    counts = {f"part_{shard}.tar": 3 for shard in range(shards)}
    (meta / ".info.yaml").write_text(yaml.safe_dump({"energon_version": "2.3.0", "shard_counts": counts}))
    return folder


def adopt(tmp_path, origin, **keys):
    (tmp_path / "ours").mkdir()
    return energon.adopt(tmp_path / "ours", origin, {**KEYS, **keys})


def test_a_dataset_with_the_old_class_name_and_info_opens(tmp_path):
    origin = someones(tmp_path / "theirs")
    before = sorted(path.relative_to(origin) for path in origin.rglob("*"))
    facts = adopt(tmp_path, origin)
    assert facts["splits"] == {"train": 3, "val": 2, "test": 0}
    assert [sample.id for sample in energon.read(tmp_path / "ours")] == ["00", "01", "02"]
    assert [sample.id for sample in energon.read(tmp_path / "ours", "val")] == ["10", "12"]
    assert sorted(path.relative_to(origin) for path in origin.rglob("*")) == before


def sqlite_index(path):
    """An index as versions from 5.3.0 on write it, of which nothing is read."""
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("create table samples (sample_key text, tar_file_id integer, byte_offset integer)")


def long(version):
    return pytest.param(version, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "version",
    ["2.1.1", *map(long, ("3.0.0", "4.0.0", "5.2.0")), "5.3.0", *map(long, ("6.0.1", "7.0.0")), "7.4.1"],
)
def test_what_each_version_prepared_is_read_with_its_split(tmp_path, version):
    """With .info.yaml before 7.0.0 and an index from 5.3.0 on, by either way to name a class."""
    origin = someones(tmp_path / "theirs")
    meta_folder, numbers = origin / ".nv-meta", tuple(map(int, version.split(".")))
    counted = yaml.safe_load((meta_folder / ".info.yaml").read_text()) | {"energon_version": version}
    if numbers >= (5,):
        named = {"__module__": "megatron.energon", "__class__": "VQASample"}
        fields = {"image": "jpg", **energon.QUESTION_ANSWER}
        described = {"sample_type": named, "field_map": fields}
        (meta_folder / "dataset.yaml").write_text(yaml.safe_dump(described))
    if numbers >= (7,):
        (meta_folder / ".info.yaml").unlink()
        (meta_folder / ".info.json").write_text(json.dumps(counted))
        (meta_folder / "index.uuid").write_text("0b8f1c9e-3c57-4d2b-9a55-8a51b1b7e7c1")
    else:
        (meta_folder / ".info.yaml").write_text(yaml.safe_dump(counted))
    if numbers >= (5, 3):
        sqlite_index(meta_folder / "index.sqlite")
    for tar in origin.glob("*.tar"):
        tar.with_name(f"{tar.name}.idx").write_bytes(b"".join(struct.pack("<Q", n) for n in range(4)))
    facts = adopt(tmp_path, origin)

    assert facts["splits"] == {"train": 3, "val": 2, "test": 0}
    assert [sample.id for sample in energon.read(tmp_path / "ours", "val")] == ["10", "12"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda shard, key, parts: ("00" if key == "10" else key, parts), "the key '00' stands twice"),
        (lambda shard, key, parts: (key, {**parts, "jpg": b"\xff\xd8\xff no"}), "sample '00': picture of"),
        (lambda shard, key, parts: (key, {**parts, "json": b"{"}), "sample '00': 00.json is not JSON"),
        (lambda shard, key, parts: (key, {**parts, "json": b"{}"}), r"no part json\[question\]"),
        (lambda shard, key, parts: (key, {**parts, "txt": b"\xff"}), "00.txt is not text in UTF-8"),
        (
            lambda shard, key, parts: (key, {**parts, "txt": b" "}),
            r"sample '00': turn 1 \(assistant\) is empty",
        ),
    ],
    ids=["duplicate-across-shards", "undecodable-picture", "no-json", "no-field", "no-text", "no-answer"],
)
def test_what_a_linked_tar_must_not_hold(tmp_path, change, sentence):
    with pytest.raises(DataError, match=sentence):
        adopt(tmp_path, someones(tmp_path / "theirs", change=change))


def torn(shard, key, parts):
    """Three samples that nobody can read; theirs leaves the last one out of its split."""
    bad = {"01": {"jpg": b"\xff\xd8\xff no"}, "10": {"json": b"{"}, "11": {"txt": b" "}}
    return f"d/{key}", {**parts, **bad.get(key, {})}


@pytest.mark.parametrize("dealt", [False, True], ids=["their split", "ours"])
def test_bad_samples_of_a_linked_tar_are_left_out_of_every_split_and_counted(tmp_path, dealt):
    origin = someones(tmp_path / "theirs", shards=4, change=torn)
    (origin / ".nv-meta/split.yaml").unlink()
    if not dealt:
        parts = {"train": ["part_0.tar", "part_1.tar"], "val": ["part_{2..3}.tar"]}
        split = {"split_parts": parts, "exclude": ["part_1.tar/d/11"]}
        (origin / ".nv-meta/split.yaml").write_text(yaml.safe_dump(split))

    facts = adopt(tmp_path, origin, reject_limit=0.5, split=(1, 1, 0))

    reasons = {"bad_json": 1, "undecodable_picture": 1, **({"empty_text": 1} if dealt else {})}
    assert (facts["read"], facts["rejected"]) == (12, reasons)
    assert facts["samples"] == 12 - len(reasons)
    lines = [json.loads(line) for line in (tmp_path / "ours/rejects.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["d/01", "d/10", "d/11"][: len(reasons)]
    assert [Path(line["file"]).name for line in lines] == ["part_0.tar", "part_1.tar", "part_1.tar"][
        : len(lines)
    ]
    found = {part: [one.id for one in energon.read(tmp_path / "ours", part)] for part in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(
        f"d/{shard}{n}" for shard in range(4) for n in range(3) if f"{shard}{n}" not in ("01", "10", "11")
    )
    assert facts["splits"] == {"train": len(found["train"]), "val": len(found["val"]), "test": 0}
    assert sorted(through_energon(tmp_path / "ours")) == sorted(found["train"])
    assert not (tmp_path / "ours/left_out.yaml").exists()


def test_a_field_map_that_fits_no_sample_is_not_a_matter_of_a_few(tmp_path):
    with pytest.raises(DataError, match=r"5 of 5 records of .*/ours are rejected \(5 missing_field\)"):
        adopt(tmp_path, someones(tmp_path / "theirs"), field_map={"context": "json[nope]"}, reject_limit=0.9)


def test_duplicate_keys_within_a_shard(tmp_path):
    """Energon merges neighbours of one key and says nothing; so does every reader that groups by keys."""
    origin = someones(tmp_path / "theirs", change=lambda shard, key, parts: (f"{shard}0", parts))
    with pytest.raises(DataError, match="the key '00' has the part jpg twice"):
        adopt(tmp_path, origin)


@pytest.mark.parametrize("keep", [0, 700, -1024])
def test_a_truncated_tar(tmp_path, keep):
    origin = someones(tmp_path / "theirs")
    content = (origin / "part_1.tar").read_bytes()
    last = max(n for n in range(0, len(content), 512) if content[n : n + 512].strip(b"\0")) + 512
    (origin / "part_1.tar").write_bytes(content[:keep] if keep >= 0 else content[:last])
    with pytest.raises(DataError, match=r"part_1.tar (is damaged or no tar|is cut short|has no samples)"):
        adopt(tmp_path, origin)


def test_joined_tars(tmp_path):
    """No reader goes on behind the end of the first."""
    origin = someones(tmp_path / "theirs")
    joined = (origin / "part_0.tar").read_bytes() + (origin / "part_1.tar").read_bytes()
    (origin / "part_0.tar").write_bytes(joined)
    with pytest.raises(DataError, match=r"part_0.tar goes on behind its end"):
        adopt(tmp_path, origin)


@pytest.mark.parametrize("name", [".info.yaml", ".info.json"])
@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"part_0.tar": 9000}, "part_0.tar holds 3 samples, and 9000 were counted"),
        ({"part_7.tar": 3}, "part_7.tar is not there, and 3 were counted"),
        ([3], "has no shard_counts"),
        ({"part_0.tar": "3"}, "has no shard_counts"),
    ],
)
def test_samples_that_were_there_when_it_was_prepared(tmp_path, name, counts, sentence):
    origin = someones(tmp_path / "theirs")
    (origin / ".nv-meta/.info.yaml").unlink()
    (origin / ".nv-meta" / name).write_text(json.dumps({"shard_counts": counts}))
    with pytest.raises(DataError, match=sentence):
        adopt(tmp_path, origin)


def talks_of_theirs(tmp_path, **fields):
    """Talks of two exchanges, described by their first."""
    words = ["<image>\nwhat?", "a ball", "sure?", "yes"]
    turns = [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(words)]
    origin = someones(
        tmp_path / "theirs",
        change=lambda _, key, parts: (key, {"jpg": parts["jpg"], "json": json.dumps(turns).encode()}),
    )
    described = {"sample_type": {"__class__": "VQASample"}, "field_map": {"image": "jpg", **fields}}
    (origin / ".nv-meta/dataset.yaml").write_text(yaml.safe_dump(described))
    return origin


def test_a_talk_of_which_a_field_map_reads_the_first_exchange(tmp_path):
    with pytest.raises(DataError, match="sample '00': it has 4 turns, of which the field_map reads 2"):
        adopt(tmp_path, talks_of_theirs(tmp_path, **energon.CONVERSATION))


@pytest.mark.parametrize(
    "keys", [{"field_map": {"context": "json"}}, {"sample_type": "CrudeWebdataset"}], ids=["field", "type"]
)
def test_keys_go_before_a_wrong_description(tmp_path, keys):
    origin = talks_of_theirs(tmp_path, context="json[7]", answers="nope")
    before = (origin / meta.DATASET).read_text()
    kept = {"field_map": {**keys["field_map"], "answers": "jpg"}} if "field_map" in keys else keys
    assert adopt(tmp_path, origin, **kept)["samples"] == 6
    assert [len(sample.messages) for sample in energon.read(tmp_path / "ours")] == [4, 4, 4]
    assert (origin / meta.DATASET).read_text() == before


FIELDS = {"image": "jpg", **energon.QUESTION_ANSWER}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({**FIELDS, "image": ["jpg", "png"]}, r"has image: \['jpg', 'png'\]; it names a part of the tar"),
        ({**FIELDS, "bild": "jpg"}, "has bild: 'jpg'"),
        ({**FIELDS, "image": None}, "has no image"),
        ({**FIELDS, 3: "jpg"}, "has 3: 'jpg'"),
        (["image"], "describes a VQAWebdataset without field_map"),
    ],
)
def test_a_field_map_of_another_shape(tmp_path, fields, sentence):
    origin = someones(tmp_path / "theirs")
    named = {"__class__": "VQAWebdataset", "field_map": fields}
    (origin / meta.DATASET).write_text(yaml.safe_dump(named))
    with pytest.raises(DataError, match=sentence):
        adopt(tmp_path, origin)


@pytest.mark.parametrize("kind", ["VQASample", {"__class__": "VQASample", "x": 1}])
def test_fields_without_a_part_are_left_out(kind):
    found = {"sample_type": kind, "field_map": {**FIELDS, "answer_weights": None}}
    assert meta.modern(found, "theirs", KEYS)["field_map"] == FIELDS


@pytest.mark.parametrize("kind", [["VQASample"], 3, {"__class__": ["VQASample"]}])
def test_a_sample_type_of_another_shape(kind, tmp_path):
    with pytest.raises(DataError, match="plait reads VQASample by a field_map"):
        meta.modern({"sample_type": kind, "field_map": FIELDS}, tmp_path, KEYS)


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ({"train": ["part_{0..1.tar"]}, "names shards by braces that are none"),
        ({"train": "part_0.tar"}, "has 'part_0.tar' where a list of shards is expected"),
        ({"train": [0]}, r"has \[0\] where a list of shards is expected"),
        (["part_0.tar"], "not a list of shards for each part"),
        ({"train": ["part_0.tar"]}, "split.yaml leaves part_1.tar out of every part"),
        ({"train": ["part_0.tar"], "extra": ["part_1.tar"]}, "has the part extra, which nothing reads"),
        ({"train": ["part_{0..1}.tar", "part_0.tar"]}, "split.yaml gives part_0.tar twice"),
        ({"train": ["part_0.tar"], "val": ["part_{0..1}.tar"]}, "split.yaml gives part_0.tar twice"),
    ],
)
def test_a_split_that_does_not_divide_the_shards(tmp_path, split, sentence):
    origin = someones(tmp_path / "theirs")
    (origin / ".nv-meta/split.yaml").write_text(yaml.safe_dump({"split_parts": split}))
    with pytest.raises(DataError, match=sentence):
        adopt(tmp_path, origin)


def test_a_shard_that_their_split_excludes_may_be_anything(tmp_path):
    origin = someones(tmp_path / "theirs")
    (origin / "part_2.tar").write_bytes(b"")
    assert set(adopt(tmp_path, origin)["shards"]) == {"part_0.tar", "part_1.tar"}


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        (
            {"__module__": "os", "__class__": "CaptioningWebdataset"},
            "describes a CaptioningWebdataset without",
        ),
        (
            {"sample_type": {"__class__": "VQASample"}, "sample_loader": "sample_loader.py:sample_loader"},
            "VQASample without field_map",
        ),
    ],
)
def test_a_description_by_code_is_refused(tmp_path, description, sentence):
    origin = someones(tmp_path / "theirs")
    (origin / ".nv-meta/dataset.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(DataError, match=sentence):
        adopt(tmp_path, origin)


def test_a_split_that_names_a_lost_shard(tmp_path):
    origin = someones(tmp_path / "theirs")
    (origin / "part_1.tar").unlink()
    with pytest.raises(DataError, match=r"split.yaml names part_1.tar, which is not there"):
        adopt(tmp_path, origin)


def test_a_folder_that_is_not_prepared(tmp_path):
    tar_of(tmp_path / "theirs/a.tar", [])
    with pytest.raises(DataError, match=r"has no .nv-meta/dataset.yaml"):
        adopt(tmp_path, tmp_path / "theirs")


def test_a_blend_names_paths_from_its_own_folder(tmp_path):
    for name in "ab":
        (tmp_path / name / ".nv-meta").mkdir(parents=True)
        split = {"split_parts": {"train": ["0.tar"], "val": ["1.tar"], "test": []}}
        (tmp_path / name / ".nv-meta/split.yaml").write_text(yaml.safe_dump(split))
    sources = {str(tmp_path / "a"): 0.25, str(tmp_path / "b"): 0.75}
    blend = energon.blend(sources, relative_to=tmp_path / "analysis" / "m")
    train, val = (blend["splits"][part]["blend"] for part in ("train", "val"))
    assert train == [{"path": "../../a", "weight": 0.25}, {"path": "../../b", "weight": 0.75}]
    assert [part["split_part"] for part in val] == ["val", "val"]
    other = energon.blend(sources, [str(tmp_path / "b")], relative_to=tmp_path)
    assert other["splits"]["val"]["blend"] == [{"path": "b", "weight": 1.0, "split_part": "val"}]


def test_what_trains_does_not_validate(tmp_path):
    for name in "ab":
        (tmp_path / name / ".nv-meta").mkdir(parents=True)
        (tmp_path / name / ".nv-meta/split.yaml").write_text("split_parts: {train: [0.tar]}")
    sources = {str(tmp_path / "a"): 1.0}
    apart = energon.blend(sources, [str(tmp_path / "b")], relative_to=tmp_path)["splits"]
    assert apart["val"]["blend"] == [{"path": "b", "weight": 1.0, "split_part": "train"}]
    assert "val" not in energon.blend(sources, relative_to=tmp_path)["splits"]
    with pytest.raises(DataError, match="a trains, and has no val split that could validate"):
        energon.blend(sources, [str(tmp_path / "a")], relative_to=tmp_path)
