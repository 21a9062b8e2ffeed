"""Files of Megatron-LLM and of LLaVA-JP's combine, built tensor by tensor from the facts of their formats."""

import argparse
import logging

import pytest
import torch
from safetensors.torch import load_file
from strategies import spec_of, weights

from plait.cli.main import main
from plait.convert import checkpoint, layouts
from plait.errors import CheckpointError
from plait.models.leaves import root
from plait.models.specs import Spec
from plait.models.weights import merkle
from plait.parallel.grid import Grid


def in_pairs(rows, size):
    """Rows of each head in the order 0, half, 1, half + 1 ..., as Megatron-LLM permutes them."""
    order = [row for one in range(size // 2) for row in (one, one + size // 2)]
    return torch.cat([head[order] for head in rows.split(size)])


def layer_of(hf, spec, layer, tp, rank):
    """A layer of Megatron-LLM, written out group by group."""
    at = f"model.layers.{layer}."
    size, groups = spec.head_dim, spec.num_key_value_heads
    heads = spec.num_attention_heads // groups
    q, k, v = (hf[f"{at}self_attn.{one}_proj.weight"] for one in "qkv")
    q, k = in_pairs(q, size), in_pairs(k, size)
    fused = []
    for group in range(groups):
        fused += [q[group * heads * size : (group + 1) * heads * size]]
        fused += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
    up, gate = (hf[f"{at}mlp.{one}_proj.weight"].chunk(tp)[rank] for one in ("up", "gate"))
    return {
        "input_layernorm.weight": hf[f"{at}input_layernorm.weight"],
        "post_attention_layernorm.weight": hf[f"{at}post_attention_layernorm.weight"],
        "self_attention.query_key_value.weight": torch.cat(fused).chunk(tp)[rank],
        "self_attention.dense.weight": hf[f"{at}self_attn.o_proj.weight"].chunk(tp, dim=1)[rank],
        "mlp.dense_h_to_4h.weight": torch.cat((up, gate)),
        "mlp.dense_4h_to_h.weight": hf[f"{at}mlp.down_proj.weight"].chunk(tp, dim=1)[rank],
    }


def padded(whole, tp, rank, rows):
    """A rank's rows of a vocabulary; the seeds repeat the last one."""
    whole = torch.cat((whole, whole[-1:].expand(rows - len(whole), -1)))
    return whole.chunk(tp)[rank]


def megatron_llm(hf, spec, folder, grid, *, raw=False, file=checkpoint.FILE, place="release"):
    """The files of ``hf_to_megatron`` (raw) or of ``checkpoint_util`` and training."""
    rows = spec.vocab_size if raw else -(-spec.vocab_size // (128 * grid.tp)) * 128 * grid.tp
    for tp, pp in grid:
        layers = {
            f"layers.{number}.{name}": tensor.clone()
            for number, layer in enumerate(grid.layers(pp, num_layers=spec.num_layers))
            for name, tensor in layer_of(hf, spec, layer, grid.tp, tp).items()
        }
        if raw:
            layers = {name.replace("self_attention", "attention"): one for name, one in layers.items()}
        model = {"transformer" if raw else "encoder": layers}
        if pp == 0:
            model["embedding"] = {
                "word_embeddings.weight": padded(hf["model.embed_tokens.weight"], grid.tp, tp, rows).clone()
            }
            if spec.patch_dim:
                own = hf["model.embed_vision_patch.weight"].chunk(grid.tp)[tp]
                model["embed_vision_patch"] = {"weight": own.clone()}
        if pp == grid.pp - 1:
            layers["final_layernorm.weight"] = hf["model.norm.weight"]
            model["lm_head"] = padded(hf["lm_head.weight"], grid.tp, tp, rows).clone()
        args = argparse.Namespace(
            tensor_model_parallel_size=grid.tp,
            pipeline_model_parallel_size=grid.pp,
            make_vocab_size_divisible_by=128,
            model_type=torch.nn.Linear,  # an enum of its own there: some class that nothing here knows
        )
        path = folder / place / grid.folder(tp=tp, pp=pp) / file
        path.parent.mkdir(parents=True)
        content = {"iteration": place, "checkpoint_version": 3.0, "args": args}
        torch.save({**content, "model": {"language_model": model}}, path)
    name = place if place == "release" else str(int(place.removeprefix("iter_")))
    (folder / "latest_checkpointed_iteration.txt").write_text(name)


@pytest.mark.parametrize("patch_dim", [0, 12], ids=["codeact", "solo"])
@pytest.mark.parametrize(
    ("grid", "keys"),
    [
        (Grid(), {"raw": True}),
        (Grid(2, 1), {}),
        (Grid(1, 2), {}),
        (Grid(2, 2), {"place": "iter_0000152"}),
        (Grid(2, 1), {"place": "iter_0000152", "file": "model_rng.pt"}),
    ],
    ids=["raw", "tp2", "pp2", "trained", "distributed optimizer"],
)
def test_megatron_llms_files_hold_the_model_they_were_made_of(grid, keys, patch_dim, tmp_path):
    spec = spec_of(patch_dim=patch_dim)
    hf = weights(spec, 3)
    megatron_llm(hf, spec, tmp_path, grid, **keys)
    assert root(layouts.released(tmp_path, spec).stream()) == merkle(hf)


def test_a_tensor_too_few_is_named(tmp_path):
    spec = spec_of()
    megatron_llm(weights(spec), spec, tmp_path, Grid())
    path = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    del content["model"]["language_model"]["encoder"]["layers.1.mlp.dense_4h_to_h.weight"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"lacks encoder.layers.1.mlp.dense_4h_to_h.weight"):
        layouts.released(tmp_path, spec)


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped", "as many groups as heads"])
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(1, 2)], ids=str)
def test_what_llava_jp_combined_is_read_and_scrambled_groups_are_named(maker, grid, groups, tmp_path, caplog):
    base = maker.hf(f"jp{groups}", num_key_value_heads=groups, num_attention_heads=4)
    source = maker.llava(f"jp{groups}", base=base)
    shards, hf = maker.shards(source, grid.tp, grid.pp), load_file(source / "model.safetensors")
    spec = Spec.of(source)
    for tp, pp in grid:
        path = checkpoint.rank_file(shards, grid, tp, pp)
        content = torch.load(path, weights_only=False)
        model = {}
        for name, tensor in content["model"].items():
            model[name.replace("vision_model.decoder.layers", "vision_model.transformer.layers")] = tensor
        for number, layer in enumerate(grid.layers(pp, num_layers=spec.num_layers)):
            q, k, v = (
                hf[f"language_model.model.layers.{layer}.self_attn.{one}_proj.weight"] for one in "qkv"
            )
            heads = [part.reshape(4, -1, part.shape[1]) for part in (q, k, v)]
            fused = torch.cat(heads, 1).flatten(0, 1).chunk(grid.tp)[tp].clone()
            model[f"language_model.decoder.layers.{number}.self_attention.linear_qkv.weight"] = fused
        if pp:
            model["language_model.embedding.word_embeddings.weight"] = torch.zeros(4, 4)
        place = tmp_path / "iter_0000001" / grid.folder(tp=tp, pp=pp) / checkpoint.FILE
        place.parent.mkdir(parents=True)
        torch.save({**content, "model": model}, place)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "carried.safetensors").write_bytes((shards / "carried.safetensors").read_bytes())
    caplog.set_level(logging.INFO, "plait")

    found = layouts.released(tmp_path, spec).stream()

    assert root(found) == merkle(hf)
    said = [record.getMessage() for record in caplog.records]
    assert any("cut by 4 query heads and not by their 2 groups" in one for one in said) == (groups == 2)
    assert any("left out: language_model.embedding" in one for one in said) == (grid.pp == 2)


def pai(shards, folder, tp, *, projector):
    """What ``hf2mcore_llava.py`` combines: its parts, the names of Transformer Engine, the LLM's config."""
    for rank in range(tp):
        content = torch.load(checkpoint.rank_file(shards, Grid(tp, 1), rank, 0), weights_only=False)
        model = {}
        for name, tensor in content["model"].items():
            fused = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            model[fused.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = tensor
            if name.startswith("vision_model.decoder") and "layernorm" not in name:
                model[f"{name.rpartition('.')[0]}._extra_state"] = None
        parts = {"language_model": "release", "vision_model": "clip_release", "": "iter_0000001"}
        for part, place in parts.items():
            held = {n: one for n, one in model.items() if projector or not n.startswith("vision_projection")}
            own = {n.removeprefix(f"{part}."): one for n, one in held.items() if n.startswith(part)}
            (folder / place / f"mp_rank_{rank:02d}").mkdir(parents=True)
            rest = {"args": content["args"], "checkpoint_version": 3.0, "iteration": 0}
            torch.save(
                {**({} if part == "vision_model" else rest), "model": own},
                folder / place / f"mp_rank_{rank:02d}/model_optim_rng.pt",
            )
    (folder / "latest_checkpointed_iteration.txt").write_text("1")


@pytest.mark.parametrize("tp", [1, 2])
def test_what_pai_combined_has_no_projector_and_is_refused_by_name(maker, tp, tmp_path, capsys):
    source = maker.llava()
    pai(maker.shards(source, tp, 1), tmp_path / "pai", tp, projector=False)
    (tmp_path / "pai/config.json").write_bytes((maker.hf() / "config.json").read_bytes())
    for words in ([], ["--hf", str(source)]):
        assert main(["convert", f"{tmp_path}/pai", f"{tmp_path}/out", *words]) == 2
        said = capsys.readouterr().err
        assert "iter_0000001/mp_rank_00/model_optim_rng.pt lacks vision_projection.encoder.linear_fc1" in said
        assert "as Pai-Megatron-Patch combines them" in said
        assert [path.name for path in tmp_path.iterdir()] == ["pai"]


def test_the_same_with_a_projector_is_read(maker, tmp_path):
    """As training saves it; the config of the language model beside it is not taken for a model's."""
    source = maker.llava()
    shards = maker.shards(source, 2, 1)
    pai(shards, tmp_path, 2, projector=True)
    (tmp_path / "config.json").write_bytes((maker.hf() / "config.json").read_bytes())
    (tmp_path / "carried.safetensors").write_bytes((shards / "carried.safetensors").read_bytes())
    _, model = layouts.opened(tmp_path, hf=source)
    assert root(model.stream()) == merkle(load_file(source / "model.safetensors"))
