"""Models of a hub on this machine: fetched file by file, linked, the same weights."""

import io
import json

import pytest
import torch
from hub_server import COMMIT, Hub
from makers import Maker
from safetensors.torch import load_file

from plait.config.hub import HubModel
from plait.config.lock import Lock
from plait.errors import CheckpointError, ConfigError, DataError
from plait.fetch.fetch import fetch
from plait.fetch.locking import lock_tree
from plait.models.build import build
from plait.models.weights import FolderTensors, merkle

SOURCE = {"kind": "hub", "repo": "us/tiny"}
SETTINGS = HubModel.model_validate(SOURCE)


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(maker, tmp_path, monkeypatch):
    """A hub with a model, and a working folder."""
    from huggingface_hub import constants

    there = [path for path in maker.hf().iterdir() if path.is_file() and path.name != "plait.json"]
    repo = {path.name: path.read_bytes() for path in there}
    others = {"pytorch_model.bin": b"a pickle", "consolidated.safetensors": b"again", ".gitattributes": b""}
    hub = Hub(repos={"models/us/tiny": {**repo, **others, "onnx/model.onnx": b""}}).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config").mkdir()
    (tmp_path / "data/models/raw_hf/x").mkdir(parents=True)
    yield hub
    hub.stop()


def fetched():
    """Every file that planning asks for."""
    lock_tree(SETTINGS.tree)
    found = Lock().files(SETTINGS, "raw_hf.x")
    for file in found:
        fetch(file, Lock().listed(file).model_dump())
    return found


def test_a_model_comes_whole_as_links_without_pickles_and_doubles(hub, maker, tmp_path):
    found = fetched()
    assert {file.file for file in found} >= {"config.json", "model.safetensors", "tokenizer.json"}
    folder = tmp_path / "data/models/raw_hf/x"
    facts = build(folder, SOURCE, [])
    assert facts == {"merkle": merkle(FolderTensors(maker.hf())), "commit": COMMIT}
    assert not {"pytorch_model.bin", "consolidated.safetensors", ".gitattributes", "onnx"} & {
        path.name for path in folder.iterdir()
    }
    assert not (folder / "tensors.json").is_symlink()
    link = folder / "model.safetensors"
    assert str(link.readlink()) == f"../../../hub/models--us--tiny/{COMMIT}/model.safetensors"
    assert hub.files_asked() == [(f"/us/tiny/resolve/{COMMIT}/{file.file}", "") for file in found]


def test_a_model_that_is_not_fetched_is_refused(hub, tmp_path):
    folder = tmp_path / "data/models/raw_hf/x"
    with pytest.raises(DataError, match="models/us/tiny@main is not locked"):
        build(folder, SOURCE, [])
    lock_tree(SETTINGS.tree)
    with pytest.raises(DataError, match="does not exist"):
        build(folder, SOURCE, [])


def test_a_file_that_was_cut_afterwards_is_refused(hub, tmp_path):
    found = fetched()
    weights = next(file for file in found if file.file == "model.safetensors")
    (tmp_path / str(weights)).write_bytes(b"short")
    with pytest.raises(DataError, match="is not the file that was fetched"):
        build(tmp_path / "data/models/raw_hf/x", SOURCE, [])


def without_safetensors(hub, **more):
    repo = hub.repos["models/us/tiny"]
    kept = {name: repo[name] for name in repo if not name.endswith((".safetensors", ".bin"))}
    hub.repos["models/us/tiny"] = kept | more


def test_a_model_in_pytorchs_older_format_is_written_as_safetensors(hub, maker, tmp_path):
    stored = io.BytesIO()
    torch.save(load_file(maker.hf() / "model.safetensors"), stored)
    without_safetensors(hub, **{"pytorch_model.bin": stored.getvalue(), "tf_model.h5": b"again"})
    found = fetched()
    assert "pytorch_model.bin" in {file.file for file in found}
    folder = tmp_path / "data/models/raw_hf/x"
    assert build(folder, SOURCE, [])["merkle"] == merkle(FolderTensors(maker.hf()))
    assert not [*folder.glob("*.bin*"), *folder.glob("*.h5")]
    assert not (folder / "model.safetensors").is_symlink()


def test_a_model_without_weights_that_plait_reads_is_refused_when_it_is_planned(hub):
    without_safetensors(hub, **{"model.gguf": b"again"})
    lock_tree(SETTINGS.tree)
    with pytest.raises(ConfigError, match=r"no safetensors and no pytorch_model\.bin, only model\.gguf"):
        Lock().files(SETTINGS, "raw_hf.x")


# A git clone, as ModelScope gives models, is a local folder


@pytest.fixture
def clone(maker, tmp_path):
    """A clone without its large files."""
    folder = tmp_path / "clone"
    (folder / ".git").mkdir(parents=True)
    for path in maker.hf().iterdir():
        if path.is_file() and path.name != "plait.json":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456\n"
    )
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return folder


def test_a_clone_without_its_large_files_is_refused_with_the_command_that_gets_them(clone, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match=r"model\.safetensors is a pointer of git LFS") as error:
        build(tmp_path / "model", {"kind": "folder", "path": str(clone)}, [])
    assert error.value.hint == f"git -C {clone} lfs pull"


def test_a_clone_with_its_large_files_is_linked(clone, maker, tmp_path):
    (clone / "model.safetensors").write_bytes((maker.hf() / "model.safetensors").read_bytes())
    (tmp_path / "model").mkdir()
    facts = build(tmp_path / "model", {"kind": "folder", "path": str(clone)}, [])
    assert facts == {"merkle": merkle(FolderTensors(maker.hf()))}
    assert (tmp_path / "model/model.safetensors").readlink() == clone / "model.safetensors"
    assert not (tmp_path / "model/.git").exists()


def test_a_lock_that_somebody_broke_is_a_sentence(hub, tmp_path):
    (tmp_path / "config/hub.lock.json").write_text(json.dumps({"models/us/tiny@main": {"commit": "main"}}))
    with pytest.raises(ConfigError, match=r"hub\.lock\.json: models/us/tiny@main: commit: "):
        Lock().tree(SETTINGS.tree)


def test_a_model_of_which_a_part_is_missing_is_refused(hub, tmp_path):
    del hub.repos["models/us/tiny"]["config.json"]
    fetched()
    with pytest.raises((CheckpointError, DataError), match=r"config\.json does not exist"):
        build(tmp_path / "data/models/raw_hf/x", SOURCE, [])
