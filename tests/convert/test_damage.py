"""Damage of every kind to every layout: one sentence that names file and tensor, and no output."""

import json
import os
import pickle
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import spec_of
from test_layouts import folder_of

from plait.cli.main import main
from plait.convert import layouts
from plait.convert.torch_dist import METADATA

LAYERS = 4
NORM = "model.layers.1.input_layernorm.weight"
FILES = {
    "safetensors": "model.safetensors",
    "classic": "release/mp_rank_01/model_optim_rng.pt",
    "torch_dist": "__0_0.distcp",
}
WORDS = {
    "safetensors": ["--to", "hf"],
    "classic": ["--tp", "2"],
    "torch_dist": ["--to", "torch_dist"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One model in each layout, as this program writes it."""
    root = tmp_path_factory.mktemp("damage")
    hf = folder_of(spec_of(num_layers=LAYERS, vocab_size=300), root / "hf", torch.bfloat16)
    for layout, words in WORDS.items():
        assert main(["convert", str(hf), str(root / layout), *words]) == 0
    return root


def place_of(folder, name=NORM):
    """The file in which a tensor stands, and where its bytes are."""
    _, model = layouts.opened(folder)
    one = model.moves(name)[-1].source.stored
    return one.path, one.offset


def cut_off(folder, file):
    os.truncate(file, file.stat().st_size // 2)


def torn(folder, file):
    """The last write was lost."""
    os.truncate(file, file.stat().st_size - 1)


def emptied(folder, file):
    file.write_bytes(b"")


def absent(folder, file):
    file.unlink()


def flipped(folder, file):
    path, offset = place_of(folder)
    content = bytearray(path.read_bytes())
    content[offset + 1] ^= 1
    path.write_bytes(content)


def classic(change):
    def damage(folder, file):
        content = torch.load(file, weights_only=False)
        change(content["model"])
        torch.save(content, file)

    return damage


def metadata(change):
    def damage(folder, file):
        path = folder / METADATA
        found = pickle.loads(path.read_bytes())
        change(found)
        path.write_bytes(pickle.dumps(found))

    return damage


def tensors(change):
    def damage(folder, file):
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})

    return damage


def twice_in_the_header(folder, file):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode().rstrip()
    again = header[:-1] + f',"{NORM}":' + json.dumps(json.loads(header)[NORM]) + "}"
    file.write_bytes(struct.pack("<Q", len(again)) + again.encode() + content[8 + length :])


def twice_in_files(folder, file):
    save_file({NORM: load_file(file)[NORM]}, folder / "model-00002-of-00002.safetensors")
    shutil.move(file, folder / "model-00001-of-00002.safetensors")
    where = dict.fromkeys(
        load_file(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"
    )
    index = {"weight_map": where | {NORM: "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def by_two_names(model):
    model["decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"] = model[f"decoder{NORM[5:]}"]


def in_anothers_place(folder, file):
    shutil.copyfile(folder / "release/mp_rank_00/model_optim_rng.pt", file)


def a_chunk_twice(found):
    name = "decoder.layers.self_attention.linear_proj.weight"
    entry = found.state_dict_metadata[name]
    entry.chunks.append(entry.chunks[1])


def a_chunk_too_few(found):
    del found.state_dict_metadata["decoder.layers.self_attention.linear_proj.weight"].chunks[1]


def chunks_in_each_others_place(found):
    """Two parameters' bytes are exchanged; they have other shapes."""
    first, second = (
        next(key for key in found.storage_data if key.fqn == f"decoder.layers.{name}.weight")
        for name in ("mlp.linear_fc2", "self_attention.linear_proj")
    )
    places = found.storage_data
    places[first], places[second] = places[second], places[first]


def without_a_place(found):
    del found.storage_data[next(key for key in found.storage_data if "linear_fc2" in key.fqn)]


def a_foreign_tensor(found):
    known = found.state_dict_metadata
    known["decoder.foreign"] = known["decoder.final_layernorm.weight"]


DAMAGE = [
    ("safetensors", cut_off, "is no whole safetensors file"),
    ("safetensors", torn, "is no whole safetensors file"),
    ("safetensors", emptied, "is no whole safetensors file"),
    ("safetensors", flipped, NORM),
    ("safetensors", twice_in_the_header, "a name stands twice"),
    ("safetensors", twice_in_files, NORM),
    ("safetensors", tensors(lambda found: found.pop(NORM)), NORM),
    ("safetensors", tensors(lambda found: found.update({NORM: found[NORM][:-1].clone()})), NORM),
    ("safetensors", tensors(lambda found: found.update(foreign=torch.zeros(2))), "foreign"),
    ("classic", cut_off, "cannot be read as a checkpoint"),
    ("classic", torn, "cannot be read as a checkpoint"),
    ("classic", emptied, "cannot be read as a checkpoint"),
    ("classic", absent, "is missing"),
    ("classic", flipped, NORM),
    ("classic", classic(by_two_names), "decoder.layers.1.input_layernorm.weight stands there by two names"),
    ("classic", classic(lambda model: model.pop(f"decoder{NORM[5:]}")), f"lacks decoder{NORM[5:]}"),
    ("classic", classic(lambda model: model.update(foreign=torch.zeros(2))), "has unknown foreign"),
    ("classic", in_anothers_place, "embed_tokens.weight|sha256"),
    ("torch_dist", cut_off, r"a chunk of [\w.]+ in "),
    ("torch_dist", torn, r"a chunk of [\w.]+ in "),
    ("torch_dist", emptied, r"a chunk of [\w.]+ in "),
    ("torch_dist", absent, r"is missing; .* lists it for [\w.]+"),
    ("torch_dist", flipped, NORM),
    ("torch_dist", metadata(a_chunk_twice), r"o_proj.weight are lost or written twice"),
    ("torch_dist", metadata(a_chunk_too_few), r"o_proj.weight"),
    ("torch_dist", metadata(chunks_in_each_others_place), r"a chunk of [\w.]+ is \("),
    ("torch_dist", metadata(without_a_place), r"does not say where a chunk of decoder.layers.mlp.linear_fc2"),
    ("torch_dist", metadata(a_foreign_tensor), "has decoder.foreign"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "damage", "sentence"), DAMAGE)
def test_damage_is_a_sentence_and_leaves_no_output(layout, damage, sentence, sources, tmp_path, capsys):
    source = shutil.copytree(sources / layout, tmp_path / "source")
    damage(source, source / FILES[layout])
    assert main(["convert", str(source), str(tmp_path / "out/target"), "--to", "classic"]) == 2
    said = capsys.readouterr().err
    errors = said[said.index("error: ") :].splitlines()
    assert re.search(sentence, errors[0])
    assert re.search(rf"{source}[/\w.-]*", errors[0]), errors
    assert len(errors) <= 2
    assert not list((tmp_path / "out").iterdir())
