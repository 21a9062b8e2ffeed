"""Weights that a folder has as ``pytorch_model.bin`` only: the same bits as safetensors; nothing is run."""

import json
import random
import shutil

import pytest
import torch
from makers import Maker
from safetensors.torch import load_file

from plait import files
from plait.errors import CheckpointError
from plait.models.pickles import Pickled
from plait.models.weights import BIN, BIN_INDEX, ONE, FolderTensors, merkle

SOURCE = {"kind": "llava", "base": "b", "vision": "v", "tokenizer": "t"}


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("pickles"))


def pickled(source, folder, *, parts=1, more=None, **options):
    """A copy of a model as it was published before safetensors."""
    shutil.copytree(source, folder)
    weights = {**load_file(folder / ONE), **(more or {})}
    (folder / ONE).unlink()
    (folder / "plait.json").unlink()
    (folder / "tf_model.h5").write_bytes(b"\x89HDF")
    if parts == 1:
        torch.save(weights, folder / BIN, **options)
        return folder
    names = [f"pytorch_model-{n + 1:05d}-of-{parts:05d}.bin" for n in range(parts)]
    where = {name: names[n % parts] for n, name in enumerate(weights)}
    for file in names:
        torch.save({name: weights[name] for name in weights if where[name] == file}, folder / file)
    files.write_json(folder / BIN_INDEX, {"metadata": {}, "weight_map": where})
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_a_linked_folder_has_the_same_tensors_as_safetensors(make, maker, tmp_path, parts):
    base = maker.hf()
    folder = pickled(base, tmp_path / "old", parts=parts)

    linked = make({"kind": "folder", "path": str(folder)})

    stored = load_file(linked / ONE)
    assert merkle(stored) == merkle(load_file(base / ONE))
    assert not [*linked.glob("*.bin*"), *linked.glob("*.h5")]
    assert merkle(FolderTensors(folder)) == merkle(FolderTensors(base))


def test_types_names_and_buffers_are_kept_and_shared_storage_is_written_twice(make, maker, tmp_path):
    base = maker.hf()
    whole = {name: tensor.bfloat16() for name, tensor in load_file(base / ONE).items()}
    rows = torch.randn(259, 64)
    whole["model.embed_tokens.weight"] = torch.nn.Parameter(rows[:, ::2])  # neither contiguous nor a buffer
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"]
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)

    linked = make({"kind": "folder", "path": str(pickled(base, tmp_path / "old", more=whole))})

    stored = load_file(linked / ONE)
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in whole.items())
    assert {name: tensor.dtype for name, tensor in stored.items()} == {n: t.dtype for n, t in whole.items()}


def test_a_whole_clip_of_the_hubs_old_form_is_a_tower(make, maker, tmp_path):
    import transformers

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = maker.tower()
    vision = files.read_json(tower / "config.json")
    config = transformers.CLIPConfig(text_config={**small, "vocab_size": 9}, vision_config=vision)
    model = transformers.CLIPModel(config)
    model.vision_model.load_state_dict(load_file(tower / ONE))
    config.save_pretrained(tmp_path)
    buffers = {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
    torch.save({**model.state_dict(), **buffers}, tmp_path / BIN)
    shutil.copyfile(tower / "preprocessor_config.json", tmp_path / "preprocessor_config.json")

    linked = make({"kind": "folder", "path": str(tmp_path)})

    built = [make(SOURCE, maker.hf(), vision, maker.image) for vision in (linked, tower)]
    assert merkle(FolderTensors(built[0])) == merkle(FolderTensors(built[1]))


class Hostile:
    """Writes a file where its pickle is loaded by a careless reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_a_sentence_and_nothing_is_run(make, maker, tmp_path, legacy):
    folder, mark = pickled(maker.hf(), tmp_path / "old"), tmp_path / "ran"
    torch.save({"x": Hostile(mark)}, folder / BIN, _use_new_zipfile_serialization=not legacy)

    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin cannot be read as tensors alone"
    ) as refused:
        make({"kind": "folder", "path": str(folder)})

    assert "safetensors" in refused.value.hint
    assert not mark.exists()
    torch.load(folder / BIN, weights_only=False)["x"].close()
    assert mark.exists()  # so it was hostile


def test_the_format_before_zip_files_is_a_sentence(make, maker, tmp_path):
    folder = pickled(maker.hf(), tmp_path / "old", _use_new_zipfile_serialization=False)

    with pytest.raises(CheckpointError, match=r"cannot be read as tensors alone"):
        make({"kind": "folder", "path": str(folder)})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "holds a list, not tensors by name"),
        ({}, "holds a dict, not tensors by name"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is no dense tensor"),
        ({3: torch.ones(1)}, "3 is no dense tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is no dense tensor"),
    ],
)
def test_other_content_is_a_sentence(tmp_path, content, sentence):
    torch.save(content, tmp_path / BIN)

    with pytest.raises(CheckpointError, match=sentence):
        FolderTensors(tmp_path)


def test_whatever_bytes_are_changed_is_read_or_a_sentence(tmp_path):
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "whole")
    whole, draw = (tmp_path / "whole").read_bytes(), random.Random(3)
    refused = 0
    for _ in range(400):
        changed = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randrange(1, 6)):
            if changed:
                changed[draw.randrange(len(changed))] = draw.randrange(256)
        (tmp_path / BIN).write_bytes(changed)
        try:
            Pickled(tmp_path / BIN)
        except CheckpointError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "has no weight_map"),
        ([], "holds a JSON list"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "has no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "pytorch_model.bin lacks a;"),
    ],
)
def test_a_wrong_index_is_a_sentence(tmp_path, index, sentence):
    torch.save({"b": torch.ones(1)}, tmp_path / BIN)
    (tmp_path / BIN_INDEX).write_text(json.dumps(index))

    with pytest.raises((CheckpointError, files.DataError), match=sentence):
        FolderTensors(tmp_path)


def test_safetensors_come_first(maker, tmp_path):
    folder = shutil.copytree(maker.hf(), tmp_path / "both")
    (folder / BIN).write_bytes(b"never opened")

    assert not FolderTensors(folder).pickled
    assert merkle(FolderTensors(folder)) == merkle(FolderTensors(maker.hf()))
