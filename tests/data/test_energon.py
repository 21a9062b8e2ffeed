"""Datasets for energon: what is written is what energon reads, and each of its traps is a sentence."""

import io
import tarfile

import numpy as np
import orjson
import pytest
import yaml
from PIL import Image

from plait.data import energon, webdataset
from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import ConfigError, DataError

KEYS = {
    "layout": "conversations", "shard_name": "{:06d}.tar", "samples_per_shard": 4, "split": [9, 1, 0],
    "split_parts": {}, "exclude": "", "sample_type": None, "field_map": {},
}  # fmt: skip


def picture(number=0, kind="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), number % 255, np.uint8)).save(file, kind)
    return Picture(file.getvalue())


def exchange(number, key=None):
    user = Message("user", (picture(number), Text(f"\nwhat is {number}?")))
    return Sample((user, Message("assistant", (Text(f"it is {number}"),))), key or f"s-{number}")


def talk(number):
    """Two pictures, two exchanges."""
    first = Message("user", (Text("look: "), picture(number), Text(" and "), picture(number + 1, "PNG")))
    answer, more = Message("assistant", (Text("seen"),)), Message("user", (Text("sure?"),))
    return Sample((first, answer, more, answer), f"t-{number}")


def build(folder, samples, **keys):
    folder.mkdir()
    return energon.build(folder, samples, {**KEYS, **keys})


@pytest.mark.parametrize(
    ("keys", "make", "described", "shard"),
    [
        ({}, exchange, {"image": "jpg", **energon.CONVERSATION}, "000000.tar"),
        (
            {"layout": "question_answer", "shard_name": "wds/pretrain-{}.tar"},
            exchange,
            {"image": "jpg", **energon.QUESTION_ANSWER},
            "wds/pretrain-0.tar",
        ),
        ({}, talk, None, "000000.tar"),
    ],
    ids=["guide-002", "guide-003", "whole-talks"],
)
def test_what_is_written_is_read_by_energon_and_by_us(tmp_path, keys, make, described, shard):
    samples = [make(number) for number in range(12)]
    facts = build(tmp_path / "d", samples, **keys)  # reads through megatron.energon.get_train_dataset
    assert facts == {
        "samples": 12,
        "shards": dict.fromkeys(facts["shards"], 4),
        "splits": {"train": 8, "val": 4, "test": 0},
    }
    assert next(iter(facts["shards"])) == shard
    found = energon.read_yaml(tmp_path / "d" / ".nv-meta" / "dataset.yaml")
    assert found.get("field_map") == described
    assert list(energon.read(tmp_path / "d")) + list(energon.read(tmp_path / "d", "val")) == samples


def test_the_parts_are_those_of_the_guides(tmp_path):
    for name, layout in (("a", "conversations"), ("b", "question_answer")):
        (tmp_path / name).mkdir()
        webdataset.write([exchange(0)], tmp_path / name, {**KEYS, "layout": layout})
    with tarfile.open(tmp_path / "a" / "000000.tar") as tar:
        assert tar.getnames()[:2] == ["s-0.jpg", "s-0.json"]
        assert orjson.loads(tar.extractfile("s-0.json").read()) == [
            {"from": "human", "value": "<image>\nwhat is 0?"},
            {"from": "gpt", "value": "it is 0"},
        ]
    with tarfile.open(tmp_path / "b" / "000000.tar") as tar:
        assert tar.getnames()[:3] == ["s-0.jpg", "s-0.txt", "s-0.json"]
        assert orjson.loads(tar.extractfile("s-0.json").read()) == {"question": "what is 0?", "id": "s-0"}
        assert tar.extractfile("s-0.txt").read() == b"it is 0"


def test_equal_samples_give_equal_tars(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        webdataset.write([exchange(n) for n in range(6)], tmp_path / name, KEYS)
    assert (tmp_path / "a/000001.tar").read_bytes() == (tmp_path / "b/000001.tar").read_bytes()


def test_a_bare_caption_is_the_answer_to_its_picture():
    caption = Sample((Message("assistant", (picture(), Text("a cat"))),), "c")
    asked = webdataset.with_question(caption)
    assert [message.role for message in asked.messages] == ["user", "assistant"]
    parts = webdataset.to_parts(asked, "question_answer")
    assert orjson.loads(parts["json"])["question"] == ""
    assert webdataset.to_sample(parts, "c") == asked


# What energon says nothing of, and what it says badly


def test_seed_23_prepare_asks_nothing(tmp_path, monkeypatch):
    """Guides 002 and 003 answer a menu whose numbers have changed since."""
    monkeypatch.setattr("sys.stdin", None)
    build(tmp_path / "d", [exchange(n) for n in range(8)])
    description = energon.read_yaml(tmp_path / "d" / ".nv-meta/dataset.yaml")
    assert description["sample_type"] == {"__module__": "megatron.energon", "__class__": "VQASample"}


def test_nothing_found(tmp_path):
    with pytest.raises(DataError, match="there is not one sample to write"):
        build(tmp_path / "d", [])


@pytest.mark.parametrize("split", [[0, 1, 0], [0, 0, 0]])
def test_a_bad_ratio(tmp_path, split):
    with pytest.raises(ConfigError, match="gives training no share"):
        build(tmp_path / "d", [exchange(0)], split=split)


def test_a_bad_pattern(tmp_path):
    with pytest.raises(ConfigError, match="is not a regular expression"):
        build(tmp_path / "d", [exchange(0)], split_parts={"train": "(", "val": "x"})


@pytest.mark.parametrize("wrong", [{"context": "json[nope]"}, {"image": "png"}])
def test_a_wrong_field_map(tmp_path, wrong):
    fields = {"image": "jpg", **energon.CONVERSATION, **wrong}
    with pytest.raises(DataError, match="energon cannot read d as described"):
        build(tmp_path / "d", [exchange(n) for n in range(8)], field_map=fields)


def test_a_split_that_leaves_training_empty(tmp_path):
    with pytest.raises(DataError, match="leaves no shard for training: 1 shards"):
        build(tmp_path / "d", [exchange(n) for n in range(3)])


def test_split_parts_and_exclude_name_shards(tmp_path):
    parts = {"train": r"00000[01]\.tar", "val": r"000002\.tar"}
    facts = build(tmp_path / "d", [exchange(n) for n in range(16)], split_parts=parts, exclude=r"000003\.tar")
    assert facts["splits"] == {"train": 8, "val": 4}
    assert "000003.tar" not in facts["shards"]


def test_leftovers_of_a_failed_prepare(tmp_path):
    folder = tmp_path / "d"
    build(folder, [exchange(n) for n in range(8)])
    (folder / ".nv-meta" / "dataset.yaml").unlink()
    (folder / ".nv-meta" / "split.yaml").unlink()
    counts = dict.fromkeys(("000000.tar", "000001.tar"), 4)
    description = {"sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"},
                   "field_map": {"image": "jpg", **energon.CONVERSATION}}  # fmt: skip
    assert energon._prepared(folder, counts, KEYS, description)["samples"] == 8


def test_duplicate_keys_of_what_we_write(tmp_path):
    with pytest.raises(DataError, match="two samples have the key 'twice'"):
        build(tmp_path / "d", [exchange(0, "twice"), exchange(1, "twice")])


def tar_of(path, samples):
    """A tar as anyone may have written it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for name, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


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
    (meta / "split.yaml").write_text(
        yaml.safe_dump({"split_parts": {"train": ["part_0.tar"], "val": ["part_1.tar"]}, "exclude": []})
    )
    counts = {f"part_{shard}.tar": 3 for shard in range(shards)}
    (meta / ".info.yaml").write_text(yaml.safe_dump({"energon_version": "2.3.0", "shard_counts": counts}))
    return folder


def adopt(tmp_path, origin):
    (tmp_path / "ours").mkdir()
    return energon.adopt(tmp_path / "ours", origin, KEYS)


def test_a_dataset_with_the_old_class_name_and_info_opens(tmp_path):
    origin = someones(tmp_path / "theirs")
    before = sorted(path.relative_to(origin) for path in origin.rglob("*"))
    facts = adopt(tmp_path, origin)
    assert facts["splits"] == {"train": 3, "val": 3}
    assert [sample.id for sample in energon.read(tmp_path / "ours")] == ["00", "01", "02"]
    assert sorted(path.relative_to(origin) for path in origin.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda shard, key, parts: ("00" if key == "10" else key, parts), "the key '00' stands twice"),
        (lambda shard, key, parts: (key, {**parts, "jpg": b"\xff\xd8\xff no"}), "sample '00': picture of"),
        (lambda shard, key, parts: (key, {**parts, "json": b"{"}), "sample '00': 00.json is not JSON"),
    ],
    ids=["duplicate-across-shards", "undecodable-picture", "no-json"],
)
def test_what_a_linked_tar_must_not_hold(tmp_path, change, sentence):
    with pytest.raises(DataError, match=sentence):
        adopt(tmp_path, someones(tmp_path / "theirs", change=change))


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


def test_a_folder_that_is_not_prepared(tmp_path):
    tar_of(tmp_path / "theirs/a.tar", [])
    with pytest.raises(DataError, match=r"has no .nv-meta/dataset.yaml"):
        adopt(tmp_path, tmp_path / "theirs")


def test_a_layout_that_has_no_place_for_a_sample():
    with pytest.raises(DataError, match="2 pictures; the layout question_answer holds one"):
        webdataset.to_parts(talk(0), "question_answer")


@pytest.mark.parametrize(
    ("turns", "pictures", "sentence"),
    [
        ([{"from": "human", "value": "<image><image>"}], 1, "has 1 pictures and says <image> 2 times"),
        ([{"from": "nobody", "value": ""}], 0, "not a list of turns"),
        (["words"], 0, "not a list of turns"),
    ],
)
def test_a_conversation_that_is_none(turns, pictures, sentence):
    with pytest.raises(webdataset.RecordError, match=sentence):
        webdataset.conversation(turns, [picture().encoded] * pictures, "k")


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
    assert other["splits"]["val"]["blend"] == [{"path": "b", "weight": 1.0, "split_part": "train"}]
