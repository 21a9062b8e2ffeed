"""``plait build``, ``plait convert`` and ``plait shard`` by hand, in an empty folder."""

import argparse
import importlib
import json
import logging

import pytest
from folders import SIZES, tokenizer_folder

from plait import files
from plait.errors import ConfigError, LayoutError

HF, RAW, SHARDED = "data/models/raw_hf", "data/models/raw", "data/models/sharded"


def plait(stage, *words, **settings):
    parser = argparse.ArgumentParser()
    module = importlib.import_module(f"plait.cli.{stage}")
    module.add(parser.add_subparsers())
    args = parser.parse_args(
        [stage, *words, "--settings", json.dumps({"stage": stage, "version": 1, **settings})]
    )
    args.run(args)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder with two tokenizers."""
    monkeypatch.chdir(tmp_path)
    tokenizer_folder(tmp_path / "data/tokenizers/plain")
    tokenizer_folder(tmp_path / "data/tokenizers/vision", vision=True)
    return tmp_path


def test_from_a_tokenizer_to_shards(work, caplog):
    caplog.set_level(logging.INFO, "plait")
    init = {"kind": "init", "tokenizer": "plain", **SIZES}
    solo = {"kind": "solo", "base": "tiny", "tokenizer": "vision", "patch_size": 4}

    plait("build", "data/tokenizers/plain", f"{HF}/tiny", source=init)
    plait("build", f"{HF}/tiny", "data/tokenizers/vision", f"{HF}/solo", source=solo)
    plait("build", f"{HF}/linked", source={"kind": "folder", "path": f"{HF}/solo"})
    plait("convert", f"{HF}/linked", f"{RAW}/x-megatron")
    plait("shard", f"{RAW}/x-megatron", f"{SHARDED}/x-megatron-tp2-pp2")

    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "39 tensors, 47584 parameters",
        "39 tensors carried, 259 -> 264 tokens",
        "9 files linked, 40 tensors",
        "40 tensors -> 28 tensors, 0.2 MB",
        "40 tensors -> 2 x 2 grid, 0.1 MB per rank",
    ]
    made = [f"{HF}/tiny", f"{HF}/solo", f"{HF}/linked", f"{RAW}/x-megatron", f"{SHARDED}/x-megatron-tp2-pp2"]
    manifests = [files.check_manifest(work / folder) for folder in made]
    assert [m["kind"] for m in manifests] == ["hf_model", "hf_model", "hf_model", "megatron", "sharded"]
    assert len({m["facts"]["merkle"] for m in manifests[1:]}) == 1
    assert list(manifests[1]["inputs"]) == ["data/models/raw_hf/tiny", "data/tokenizers/vision"]
    assert list(manifests[4]["inputs"]) == [f"{RAW}/x-megatron"]
    assert str(work) not in json.dumps(manifests)


def test_llava_from_its_three_parts(work, caplog):
    caplog.set_level(logging.INFO, "plait")
    tokenizer_folder(work / "data/tokenizers/image", image=True)
    llava = {"kind": "llava", "base": "tiny", "vision": "clip", "tokenizer": "image"}

    plait(
        "build", "data/tokenizers/plain", f"{HF}/tiny", source={"kind": "init", "tokenizer": "plain", **SIZES}
    )
    plait("build", f"{HF}/clip", source={"kind": "init_tower"})
    plait("build", f"{HF}/tiny", f"{HF}/clip", "data/tokenizers/image", f"{HF}/llava", source=llava)

    assert [record.getMessage() for record in caplog.records][1:] == [
        "55 tensors, 50912 parameters, 17 features a picture",
        "94 tensors carried, 259 -> 261 token rows",
    ]
    manifest = files.check_manifest(work / HF / "llava")
    assert list(manifest["inputs"]) == [f"{HF}/clip", f"{HF}/tiny", "data/tokenizers/image"]
    with pytest.raises(ConfigError, match="kind llava is made from 3 parts, 2 were given"):
        plait("build", f"{HF}/tiny", f"{HF}/clip", f"{HF}/other", source=llava)


def test_a_name_that_contradicts_is_refused(work):
    plait(
        "build", "data/tokenizers/plain", f"{HF}/tiny", source={"kind": "init", "tokenizer": "plain", **SIZES}
    )
    plait("convert", f"{HF}/tiny", f"{RAW}/x-megatron")

    with pytest.raises(LayoutError, match="is not a Sharded path"):
        plait("shard", f"{RAW}/x-megatron", f"{SHARDED}/x-megatron-tp2")
    with pytest.raises(ConfigError, match="2 query groups do not divide among 4 tensor ranks"):
        plait("shard", f"{RAW}/x-megatron", f"{SHARDED}/x-megatron-tp4-pp1")
    assert not (work / SHARDED / "x-megatron-tp4-pp1").exists()
