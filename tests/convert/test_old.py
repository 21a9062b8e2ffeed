"""Files of Megatron-LLM and of LLaVA-JP's combine, built tensor by tensor from the facts of their formats."""

import argparse
import logging

import pytest
import torch
from safetensors.torch import load_file
from strategies import spec_of, weights

from plait.convert import checkpoint, layouts
from plait.convert.stream import root
from plait.errors import CheckpointError
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
