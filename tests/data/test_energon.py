"""Datasets for energon: what is written is what energon reads, and each of its traps is a sentence."""

import pytest
import yaml
from talks import KEYS, exchange, talk, tar_of

from plait.data import energon, webdataset
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
    folder, samples, facts = made  # building reads through megatron.energon.get_train_dataset
    one = samples[0].id == "s-0"
    names = ["wds/pretrain-0.tar", "wds/pretrain-1.tar"] if one else ["000000.tar", "000001.tar"]
    train = 10 if one else 8
    assert facts["samples"] == sum(facts["shards"].values()) == 12
    assert facts["splits"] == {"train": train, "val": 12 - train, "test": 0}
    assert set(names) < facts["shards"].keys()
    found = energon.read_yaml(folder / energon.DATASET)
    assert found.get("field_map") == ({"image": "jpg", **energon.CONVERSATION} if one else None)
    read = [*energon.read(folder), *energon.read(folder, "val")]
    assert sorted(read, key=lambda sample: sample.id) == sorted(samples, key=lambda sample: sample.id)


def test_seed_23_prepare_asks_nothing(made):
    """Guides 002 and 003 answer a menu by numbers, which have changed since; here nobody is there to ask."""
    folder, samples, _ = made
    found = energon.read_yaml(folder / energon.DATASET)
    name = found.get("sample_type", found)["__class__"]
    assert name == ("VQASample" if len(samples[0].pictures) == 1 else "CrudeWebdataset")


# What energon says nothing of, and what it says badly


def test_nothing_found(tmp_path):
    with pytest.raises(DataError, match="there is not one sample to write"):
        build(tmp_path / "d", [])
    with pytest.raises(DataError, match=r"e has no tar, or energon.exclude leaves all of them out"):
        build(tmp_path / "e", [exchange(0)], exclude="tar")


@pytest.mark.parametrize("split", [[0, 1, 0], [0, 0, 0]])
def test_a_bad_ratio(tmp_path, split):
    with pytest.raises(ConfigError, match="gives training no share"):
        build(tmp_path / "d", [exchange(0)], split=split)


def test_a_bad_pattern(tmp_path):
    with pytest.raises(ConfigError, match="is not a regular expression"):
        build(tmp_path / "d", [exchange(0)], split_parts={"train": "(", "val": "x"})


def test_a_wrong_field_map(tmp_path):
    fields = {"image": "jpg", **energon.CONVERSATION, "context": "json[nope]"}
    with pytest.raises(DataError, match=r"energon cannot read d as described: \w+Error: .*nope"):
        build(tmp_path / "d", [exchange(n) for n in range(8)], field_map=fields)


def test_a_sample_type_that_would_drop_turns(tmp_path):
    with pytest.raises(ConfigError, match="samples of d have more"):
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


def test_duplicate_keys_of_what_we_write(tmp_path):
    with pytest.raises(DataError, match="two samples have the key 'twice'"):
        build(tmp_path / "d", [exchange(0, "twice"), exchange(1, "twice")])


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


def adopt(tmp_path, origin):
    (tmp_path / "ours").mkdir()
    return energon.adopt(tmp_path / "ours", origin, KEYS)


def test_a_dataset_with_the_old_class_name_and_info_opens(tmp_path):
    origin = someones(tmp_path / "theirs")
    before = sorted(path.relative_to(origin) for path in origin.rglob("*"))
    facts = adopt(tmp_path, origin)
    assert facts["splits"] == {"train": 3, "val": 2, "test": 0}
    assert [sample.id for sample in energon.read(tmp_path / "ours")] == ["00", "01", "02"]
    assert [sample.id for sample in energon.read(tmp_path / "ours", "val")] == ["10", "12"]
    assert sorted(path.relative_to(origin) for path in origin.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda shard, key, parts: ("00" if key == "10" else key, parts), "the key '00' stands twice"),
        (lambda shard, key, parts: (key, {**parts, "jpg": b"\xff\xd8\xff no"}), "sample '00': picture of"),
        (lambda shard, key, parts: (key, {**parts, "json": b"{"}), "sample '00': 00.json is not JSON"),
        (lambda shard, key, parts: (key, {**parts, "json": b"{}"}), r"no part json\[question\]"),
        (lambda shard, key, parts: (key, {**parts, "txt": b"\xff"}), "00.txt is not text in UTF-8"),
    ],
    ids=["duplicate-across-shards", "undecodable-picture", "no-json", "no-field", "no-text"],
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
    assert other["splits"]["val"]["blend"] == [{"path": "b", "weight": 1.0, "split_part": "train"}]
