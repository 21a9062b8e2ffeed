"""The command: chat records of both layouts, and folders that someone prepared, as energon reads them."""

import json
import pickle
from pathlib import Path

import pytest
import yaml
from talks import exchange, tar_of

from plait import files, layout
from plait.cli.main import main
from plait.config.model import load_file
from plait.config.plan import Plan
from plait.data import energon, meta, webdataset

CONFIG = {
    "datasets": {
        "mine": {
            "source": {"kind": "chat-jsonl", "path": "mine.jsonl"},
            "shards": 2,
            "energon": {"layout": "question_answer", "samples_per_shard": 3},
        },
        "theirs": {"source": {"kind": "energon", "path": "theirs"}},
    }
}
MINE, THEIRS = "data/energon/mine", "data/energon/theirs"
SHARDS = [f"data/processed/mine/shard_0000{number}.jsonl.gz" for number in (0, 1)]
SAMPLES = [exchange(number) for number in range(12)]


class Shouts:
    """What a stranger's pickle may do."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def run(*words):
    return main([*words, "--config", "config.yaml"])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Both datasets, made by the commands from nothing."""
    root = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
        Path("mine.jsonl").write_bytes(b"\n".join(sample.to_line() for sample in SAMPLES))
        assert run("raw", "data/raw/mine") == 0
        for shard in SHARDS:
            assert run("chat", "data/raw/mine", shard) == 0
        assert run("energon", *SHARDS, MINE) == 0
        prepared_in_2023()
        assert run("raw", "data/raw/theirs") == 0
        assert run("energon", "data/raw/theirs", THEIRS) == 0
        yield root


def prepared_in_2023():
    """A folder of energon 2.3, with parts that no field names."""
    for shard in range(2):
        samples = [
            (
                f"{shard}{n}",
                webdataset.to_parts(exchange(n), "question_answer") | {"pkl": pickle.dumps(Shouts())},
            )
            for n in range(4)
        ]
        tar_of(Path(f"theirs/part_{shard}.tar"), samples)
    meta = {
        "dataset.yaml": {
            "__module__": "megatron.energon", "__class__": "VQAWebdataset",
            "field_map": {"image": "jpg", **energon.QUESTION_ANSWER},
        },
        "split.yaml": {"split_parts": {"train": ["part_{0..1}.tar"], "val": [], "test": []}, "exclude": []},
        ".info.yaml": {"energon_version": "2.3.0", "shard_counts": {"part_0.tar": 4, "part_1.tar": 4}},
    }  # fmt: skip
    Path("theirs/.nv-meta").mkdir()
    for name, value in meta.items():
        Path(f"theirs/.nv-meta/{name}").write_text(yaml.safe_dump(value))


def through_energon(folder):
    """Every training sample, as a task encoder gets it."""
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.errors import reraise_exception

    from plait.data.reader import Conversations

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    more = dict.fromkeys(("batch_size", "shuffle_buffer_size", "max_samples_per_sequence"))
    dataset = get_train_dataset(
        folder, worker_config=workers, task_encoder=Conversations(), repeat=False, **more
    )
    return sorted(get_loader(dataset), key=lambda sample: sample.id)


def test_the_manifest_says_what_it_is_and_what_it_was_made_from(workplace):
    manifest = files.check_manifest(MINE)
    assert manifest["kind"] == "energon"
    assert manifest["inputs"] == {name: files.digest_of_input(name) for name in SHARDS}
    shards = {f"00000{number}.tar": 3 for number in range(4)}
    splits = {"train": 9, "val": 3, "test": 0}
    none = {"excluded": 0, "other_part": 0, "rejected": {}}
    facts = {"samples": 12, "shards": shards, "splits": splits, "read": 12, **none}
    assert manifest["facts"] == facts
    assert {*shards, ".nv-meta/dataset.yaml", ".nv-meta/split.yaml"} < manifest["files"].keys()
    assert set(files.check_manifest(THEIRS)["inputs"]) == {"data/raw/theirs"}


@pytest.mark.parametrize("folder", [MINE, THEIRS])
def test_energon_and_we_read_the_same(workplace, folder):
    found = sorted(energon.read(Path(folder)), key=lambda sample: sample.id)
    assert len(found) == files.read_manifest(folder)["facts"]["splits"]["train"]
    assert through_energon(folder) == found
    assert {sample.messages for sample in found} <= {sample.messages for sample in SAMPLES}
    assert not Path("unpickled").exists()


def test_someones_folder_is_linked_and_stays_as_it_was(workplace):
    theirs = sorted(path.relative_to("theirs").as_posix() for path in Path("theirs").rglob("*.*"))
    assert theirs == [
        ".nv-meta", ".nv-meta/.info.yaml", ".nv-meta/dataset.yaml", ".nv-meta/split.yaml", "part_0.tar",
        "part_1.tar",
    ]  # fmt: skip
    assert Path(THEIRS, "part_0.tar").readlink() == Path("theirs/part_0.tar").resolve()
    assert meta.read_yaml(Path(THEIRS, meta.DATASET))["sample_type"]["__class__"] == "VQASample"


def test_an_equal_rebuild_has_an_equal_manifest(workplace):
    before = Path(MINE, "plait.json").read_bytes()
    settings = Plan(load_file("config.yaml")).settings_text(layout.Energon.parse(MINE))
    assert main(["energon", *SHARDS, MINE, "--settings", settings]) == 0
    assert Path(MINE, "plait.json").read_bytes() == before


def test_a_strangers_tar_runs_no_code(workplace):
    from plait.data.reader import Conversations

    pickled = pickle.dumps(Shouts())
    sample = {"__key__": "k", "pkl": pickled, "json": b"[1]", "txt": b"a", "jpg": b"\xff"}
    decoded = {"__key__": "k", "pkl": pickled, "json": [1], "txt": "a", "jpg": b"\xff"}
    assert Conversations().decoder(sample) == decoded
    assert not Path("unpickled").exists()


def test_a_tar_that_was_changed_since_is_found(workplace, capsys):
    path = Path("theirs/part_1.tar")
    content = path.read_bytes()
    try:
        path.write_bytes(content.replace(b"it is 0", b"it is 9"))
        assert run("energon", "data/raw/theirs", THEIRS) == 2
    finally:
        path.write_bytes(content)
    assert "part_1.tar does not have the sha256" in capsys.readouterr().err


def packed(names, *records):
    """Datasets of one record each, as chat records; the settings that pack them together."""
    for name, record in zip(names, records, strict=True):
        Path(f"{name}.jsonl").write_bytes(record.to_line())
    ones = {name: {"source": {"kind": "chat-jsonl", "path": f"{name}.jsonl"}} for name in names}
    datasets = {**ones, "both": {"pack_together": names, "energon": {"split": [1, 0, 0]}}}
    Path("packed.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    chats = [f"data/processed/{name}/shard_00000.jsonl.gz" for name in names]
    for name, shard in zip(names, chats, strict=True):
        assert main(["raw", f"data/raw/{name}", "--config", "packed.yaml"]) == 0
        assert main(["chat", f"data/raw/{name}", shard, "--config", "packed.yaml"]) == 0
    return main(["energon", *chats, "data/energon/both", "--config", "packed.yaml"])


def test_datasets_with_equal_ids_are_packed_together(workplace):
    assert packed(["a", "b"], exchange(1, "x"), exchange(2, "x")) == 0
    keys = [sample.id.partition("-")[0] for sample in energon.read(Path("data/energon/both"))]
    assert keys == ["a_x", "b_x"]


def test_two_records_of_one_id_are_named_by_shard_and_line(workplace, capsys):
    twice = [exchange(n, "twice" if n in (3, 8) else None).to_line() for n in range(12)]
    Path("twice.jsonl").write_bytes(b"\n".join(twice))
    mine = {**CONFIG["datasets"]["mine"], "source": {"kind": "chat-jsonl", "path": "twice.jsonl"}}
    Path("twice.yaml").write_text(yaml.safe_dump({"datasets": {"twice": mine}}))
    shards = [f"data/processed/twice/shard_0000{number}.jsonl.gz" for number in (0, 1)]
    for target in (["raw", "data/raw/twice"], *(["chat", "data/raw/twice", shard] for shard in shards)):
        assert main([*target, "--config", "twice.yaml"]) == 0
    assert main(["energon", *shards, "data/energon/twice", "--config", "twice.yaml"]) == 2
    said = capsys.readouterr().err
    assert "1 of 12 records of data/energon/twice are rejected (1 duplicate_id)" in said
    assert f"{shards[1]} line 2: {shards[0]} line 5 has the same id" in said


def test_a_failure_leaves_what_was_there_and_names_the_dataset(workplace, capsys):
    before = Path(MINE, "plait.json").read_bytes()
    settings = json.loads(Plan(load_file("config.yaml")).settings_text(layout.Energon.parse(MINE)))
    settings["energon"]["exclude"] = "tar"
    assert main(["energon", *SHARDS, MINE, "--settings", json.dumps(settings)]) == 2
    assert "mine has no tar, or energon.exclude leaves all of them out" in capsys.readouterr().err
    assert Path(MINE, "plait.json").read_bytes() == before
    assert not list(Path("data/energon").glob(".*"))
