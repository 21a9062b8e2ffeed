"""LLaVA on every grid computes what transformers computes; a fault in its tower or projector is caught."""

import dataclasses
from pathlib import Path

import pytest
import torch
from makers import Maker
from safetensors.torch import load_file, save_file

from plait import files
from plait.convert import checkpoint, engine, layouts, ops, tables
from plait.errors import CheckpointError, ProofError
from plait.layout import CARRIED
from plait.models.leaves import root
from plait.models.specs import EMBEDDING, HEAD, LANGUAGE_MODEL, TOWER, Spec
from plait.models.weights import FolderTensors, merkle
from plait.parallel.grid import Grid
from plait.preflight.ranks import checked
from plait.verify import parity
from plait.verify.cases import cases

GRIDS = [{"tp": 1, "pp": 1}, {"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}, {"tp": 2, "pp": 2, "first": 1}]
EMBEDDED = "language_model.embedding.word_embeddings.weight"
TIED = "language_model.output_layer.weight"
CASES = {"text", "packed", "one picture", "several pictures"}


def clip(maker):
    return maker.llava()


def siglip(maker):
    """30 pixels are 3 patches of 8 and 6 left over: the shape of 384/14."""
    return maker.llava("siglip", tower=maker.tower("siglip"))


def wide(maker):
    """The last layer, the class token kept, an inner size of its own, no bias."""
    keys = {"projector_hidden_size": 24, "projector_bias": False, "drop_class_token": False}
    return maker.llava("wide", vision_feature_layer=-1, **keys)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("make", [clip, siglip])
def test_a_sharded_llava_computes_what_transformers_computes(maker, make, grid, tmp_path):
    source = make(maker)
    shards = maker.shards(source, grid["tp"], grid["pp"], first=grid.get("first"))
    found = parity.prove_converted(source, shards, tmp_path / "parity.json")
    assert found["merkle_root"] == files.read_manifest(source)["facts"]["merkle"]
    assert found["grid"] == grid
    assert {row["case"] for row in found["logits"]} == CASES
    for row in found["logits"]:
        assert row["max_abs_diff"] <= 1e-5
        assert row["max_abs_diff_fp32"] <= 1e-5
        assert row["top1_equal"] == row["positions"]
        assert row["max_abs_logit"] > 0.5


def test_the_rounding_of_transformers_norms_is_not_taken_for_a_fault(maker, tmp_path):
    """They take sums in fp32, even in a model of fp64; where logits are large, that shows."""
    source = tmp_path / "hf"
    source.mkdir()
    for path in maker.llava().iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["language_model.lm_head.weight"] *= 1e4
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    facts = {"merkle": merkle(FolderTensors(source))}
    files.write_manifest(source, kind="hf_model", settings={}, facts=facts)
    scaled = Maker(tmp_path)
    found = parity.prove_converted(source, scaled.shards(source, 1, 1), tmp_path / "parity.json")
    for row in found["logits"]:
        assert row["max_abs_logit"] > 1e3
        assert row["max_abs_diff"] <= 1e-8


def test_a_wide_projector_and_qwen2_are_proven(maker, tmp_path):
    source = wide(maker)
    parity.prove_converted(source, maker.shards(source, 2, 1), tmp_path / "wide.json")
    qwen = maker.llava("qwen2", base=maker.foreign("Qwen2"))
    parity.prove_converted(qwen, maker.shards(qwen, 1, 2), tmp_path / "qwen2.json")


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        pytest.param("Qwen2", Grid(), marks=pytest.mark.long),
        ("Qwen2", Grid(2, 2)),
        pytest.param("Qwen2", Grid(1, 2), marks=pytest.mark.long),
        pytest.param("Llama", Grid(2, 1), marks=pytest.mark.long),
        ("Llama", Grid(1, 2)),
    ],
    ids=str,
)
def test_a_tied_llava_is_proven_and_its_last_stage_has_a_copy(maker, kind, grid, tmp_path):
    source = maker.tied_llava(kind)
    spec = Spec.of(source)
    assert spec.tied
    assert LANGUAGE_MODEL + HEAD not in FolderTensors(source)

    shards = maker.shards(source, grid.tp, grid.pp)
    found = parity.prove_converted(source, shards, tmp_path / "parity.json")

    assert found["merkle_root"] == files.read_manifest(source)["facts"]["merkle"]
    assert {row["case"] for row in found["logits"]} == CASES
    assert min(row["max_abs_logit"] for row in found["logits"]) > 0.5
    assert len(checked(spec, grid, {"params_dtype": "fp32"})) == len(grid)
    for tp in range(grid.tp):
        first, last = (checkpoint.read_rank(shards, grid, tp, stage) for stage in (0, grid.pp - 1))
        assert (TIED in last) == (grid.pp > 1)
        assert grid.pp == 1 or torch.equal(first[EMBEDDED], last[TIED])


def test_a_copy_of_a_tied_llava_that_differs_is_found(maker, tmp_path):
    source = maker.tied_llava("Llama")
    shards = copied(maker.shards(source, 1, 2), tmp_path)
    path = checkpoint.rank_file(shards, Grid(1, 2), 0, 1)
    content = torch.load(path, weights_only=False)
    content["model"][TIED][3] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight"):
        root(layouts.released(shards, Spec.of(source)).stream())


@pytest.mark.parametrize("equal", [True, False])
def test_an_output_layer_that_a_tied_llava_holds_too_is_its_embedding(maker, tmp_path, equal):
    source = copied(maker.tied_llava("Llama"), tmp_path)
    weights = load_file(source / "model.safetensors")
    head = weights[LANGUAGE_MODEL + EMBEDDING].clone()
    save_file(weights | {LANGUAGE_MODEL + HEAD: head if equal else head + 1}, source / "model.safetensors")
    if equal:
        assert merkle(FolderTensors(source)) == files.read_manifest(source)["facts"]["merkle"]
        assert FolderTensors(source).note == ", language_model.lm_head.weight left out: it is the embedding"
    else:
        with pytest.raises(CheckpointError, match="ties its output layer to the embedding, and holds anoth"):
            FolderTensors(source)


# What goes along


def copied(folder, tmp_path):
    target = tmp_path / folder.name
    target.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


def test_seed_18_unused_layers_come_back_bit_for_bit(maker):
    source = siglip(maker)
    shards = maker.shards(source, 2, 1)
    spec = Spec.of(source)
    assert root(layouts.released(shards, spec).stream()) == merkle(FolderTensors(source))
    names = load_file(shards / CARRIED).keys()
    assert names == tables.carried(spec).keys()
    assert {name.removeprefix(TOWER).split(".")[0] for name in names} == {"encoder", "post_layernorm", "head"}
    assert {name.split(".")[4] for name in names if ".layers." in name} == {"2"}
    assert files.read_manifest(shards)["facts"]["coverage"]["carried_tensors"] == len(names)


def test_a_changed_or_missing_carried_tensor_is_found(maker, tmp_path):
    shards = copied(maker.shards(clip(maker), 2, 1), tmp_path)
    spec = Spec.of(clip(maker))
    tensors = load_file(shards / CARRIED)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, shards / CARRIED)
    with pytest.raises(CheckpointError, match=r"carried.safetensors lacks"):
        layouts.released(shards, spec)
    (shards / CARRIED).unlink()
    with pytest.raises(CheckpointError, match=r"carried.safetensors is missing"):
        layouts.released(shards, spec)


# Regressions of the four systems


@pytest.mark.parametrize("kind", ["missing", "unknown"])
def test_seed_11_loading_is_strict_by_name(maker, kind, tmp_path):
    shards = copied(maker.shards(clip(maker), 1, 2), tmp_path)
    path = checkpoint.rank_file(shards, Grid(1, 2), 0, 0)
    content = torch.load(path, weights_only=False)
    model = content["model"]
    model["vision_model.decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.zeros(1)
    torch.save(content, path)
    checkpoint.read_rank(shards, Grid(1, 2), 0, 0)  # TE's own entries are no tensors of the model
    if kind == "missing":
        model.pop("vision_projection.encoder.linear_fc1.weight")
    else:
        model["vision_model.ln_post.weight"] = torch.zeros(1)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight|ln_post.weight"):
        checkpoint.read_rank(shards, Grid(1, 2), 0, 0)


def test_seed_10_every_stage_of_a_pipeline_is_read(maker, tmp_path):
    """Pai's combine opened mp_rank_0X and left mp_rank_0X_YYY alone."""
    shards = copied(maker.shards(clip(maker), 1, 2), tmp_path)
    assert sorted(path.parent.name for path in shards.rglob("*.pt")) == ["mp_rank_00_000", "mp_rank_00_001"]
    states = [checkpoint.read_rank(shards, Grid(1, 2), 0, stage) for stage in (0, 1)]
    assert any(name.startswith("vision_model.") for name in states[0])
    assert {name.partition(".")[0] for name in states[1]} == {"language_model"}
    checkpoint.rank_file(shards, Grid(1, 2), 0, 1).unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_00_001/model_optim_rng.pt is missing"):
        layouts.released(shards, Spec.of(clip(maker)), Grid(1, 2))


def test_seed_6_scrambled_groups_do_not_pass(maker, tmp_path, monkeypatch):
    """LLaVA-JP reshaped k and v by heads, and undid it in the same way."""
    scrambled = [
        dataclasses.replace(row, op=ops.QKVByHeads()) if "linear_qkv" in row.mcore else row
        for row in tables.MISTRAL
    ]
    monkeypatch.setitem(tables.TABLES, "MistralForCausalLM", tuple(scrambled))
    from plait.convert import folders

    folder = tmp_path / "whole"
    folder.mkdir()
    facts = folders.convert(clip(maker), folder)
    assert facts["merkle"] == files.read_manifest(clip(maker))["facts"]["merkle"]  # the round trip is fine
    files.write_manifest(folder, kind="megatron", settings={}, facts=facts)
    with pytest.raises(ProofError, match="max abs difference"):
        parity.prove_converted(clip(maker), folder, tmp_path / "parity.json")


def test_seed_25_lengths_of_training_are_not_read_from_a_checkpoint(maker, tmp_path):
    """A checkpoint's arguments silently overrode the sequence length; here nothing reads one from them."""
    shards = copied(maker.shards(clip(maker), 1, 1), tmp_path)
    path = checkpoint.rank_file(shards, Grid(), 0, 0)
    content = torch.load(path, weights_only=False)
    content["args"].seq_length = content["args"].max_position_embeddings = 7
    torch.save(content, path)
    state = checkpoint.read_rank(shards, Grid(), 0, 0)
    assert state.keys() == engine.rank_shapes(Spec.of(clip(maker)), Grid()).keys()
    source = Path(checkpoint.__file__).parents[1] / "train"
    assert not [path for path in source.glob("*.py") if "read_args" in path.read_text()]


@pytest.mark.parametrize("image", [0, 1, 259])
def test_in_a_proof_a_pictures_token_stands_for_pictures_alone_whatever_its_id(maker, image):
    spec = dataclasses.replace(Spec.of(maker.llava()), image_token_id=image)
    for case in cases(spec):
        rows = torch.full_like(case.input_ids, -1) if case.picture_rows is None else case.picture_rows
        assert torch.equal(case.input_ids == image, rows >= 0)
