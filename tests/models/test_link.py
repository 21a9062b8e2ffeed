"""Models that are on this machine already: what their folder must hold, and what is added to it."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest

from plait import files
from plait.errors import CheckpointError, ConfigError, DataError
from plait.layout import TENSORS
from plait.models.leaves import Leaf, read_leaves, write_leaves
from plait.models.weights import FolderTensors, leaves_of
from plait.tokens import tokenizer as stage


def link(make, folder):
    return make({"kind": "folder", "path": str(folder)})


@pytest.fixture
def downloaded(base, tmp_path):
    """A copy of a model that plait did not make."""
    folder = shutil.copytree(base, tmp_path / "downloaded")
    (folder / "plait.json").unlink()
    return folder


def test_a_model_without_a_tokenizer_is_refused_before_training(make, downloaded):
    (downloaded / "tokenizer.json").unlink()

    with pytest.raises(CheckpointError, match=r"has neither tokenizer.json nor tokenizer.model") as refused:
        link(make, downloaded)

    assert "download" in refused.value.hint


def test_a_sentencepiece_tokenizer_is_converted_as_the_tokenizer_stage_does(make, downloaded, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (downloaded / name).unlink(missing_ok=True)
    package = Path(importlib.util.find_spec("mistral_common").origin).parent
    shutil.copyfile(package / "data/tokenizer.model.v1", downloaded / "tokenizer.model")
    made = tmp_path / "made"
    made.mkdir()
    stage.build(made, {"kind": "folder", "path": str(downloaded)})

    linked = link(make, downloaded)

    assert (linked / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    assert (linked / "tokenizer_config.json").is_file()
    assert not (downloaded / "tokenizer.json").exists()


def test_a_linked_models_tokenizer_is_that_of_its_folder_byte_for_byte(make, downloaded, tmp_path, caplog):
    caplog.set_level(logging.INFO, "plait.models")
    path = downloaded / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # another layout of the same
    made = tmp_path / "made"
    made.mkdir()
    stage.build(made, {"kind": "folder", "path": str(downloaded)})

    linked = link(make, downloaded)

    assert files.digest(linked / "tokenizer.json") == files.digest(made / "tokenizer.json")
    assert files.digest(linked / "tokenizer.json") != files.digest(path)
    assert caplog.records[-1].getMessage().endswith("39 tensors, written: tokenizer.json")


@pytest.mark.parametrize(
    "ids", [{}, {"bos_token_id": None}, {"eos_token_id": [2, 7]}, {"pad_token_id": 0, "bos_token_id": 5}]
)
def test_a_missing_generation_config_is_written_as_transformers_would(make, downloaded, ids):
    from transformers import AutoConfig, GenerationConfig

    (downloaded / "generation_config.json").unlink()
    config = files.read_json(downloaded / "config.json")
    given = {k: v for k, v in config.items() if k not in ("bos_token_id", "eos_token_id")} | ids
    (downloaded / "config.json").write_text(json.dumps(given))

    ours = GenerationConfig.from_pretrained(link(make, downloaded))

    theirs = GenerationConfig.from_model_config(AutoConfig.from_pretrained(downloaded))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert not (downloaded / "generation_config.json").exists()


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "no json", '{"added_tokens": [], "model": {"type": "none"}}', "\udcff"],
    ids=["empty", "list", "text", "model", "bytes"],
)
def test_a_broken_tokenizer_gets_a_sentence_in_both_stages(make, downloaded, tmp_path, text):
    (downloaded / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(DataError, match=r"downloaded.*(cannot be read|is not JSON|has no model)"):
        link(make, downloaded)
    with pytest.raises(DataError, match=r"downloaded.*(cannot be read|is not JSON|has no model)"):
        stage.build(tmp_path, {"kind": "folder", "path": str(downloaded)})


def test_a_path_at_home_is_that_of_planning(make, downloaded, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(downloaded.parent))
    (tmp_path / "made").mkdir()

    linked = link(make, "~/downloaded")
    facts = stage.build(tmp_path / "made", {"kind": "folder", "path": "~/downloaded"})

    assert facts["vocab_size"] == 259
    assert (linked / "config.json").resolve() == downloaded / "config.json"
    with pytest.raises(ConfigError, match="no such home folder"):
        link(make, "~nobody-of-this-name/x")


@pytest.mark.parametrize("how", ["file", "link"])
def test_digests_of_tensors_that_a_folder_has_are_neither_linked_nor_written_through(
    make, downloaded, tmp_path, how
):
    """A linked export, and one in which they are a link themselves."""
    theirs = (downloaded / TENSORS).rename(tmp_path / "theirs") if how == "link" else downloaded / TENSORS
    theirs.write_text("{}")
    if how == "link":
        (downloaded / TENSORS).symlink_to(theirs)

    linked = link(make, downloaded)

    assert not (linked / TENSORS).is_symlink()
    assert read_leaves(linked) == leaves_of(FolderTensors(linked))
    assert theirs.read_text() == "{}"


def test_a_link_where_digests_of_tensors_go_is_replaced(tmp_path):
    (tmp_path / "theirs").write_text("{}")
    (tmp_path / TENSORS).symlink_to(tmp_path / "theirs")

    write_leaves(tmp_path, {"a": Leaf("float32", (2, 3), "0" * 64)})

    assert read_leaves(tmp_path) == {"a": Leaf("float32", (2, 3), "0" * 64)}
    assert (tmp_path / "theirs").read_text() == "{}"
