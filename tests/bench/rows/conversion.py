"""Conversion beside copying, and beside the straightforward way: load all, map, `torch.save`.

A Llama-shaped bf16 model of about 2 GB goes from Hugging Face's layout to two tensor ranks and back, from
warm and from cold files; the copy is `cp -r` of the same bytes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from functools import partial

from tests.bench.harness import Own, Row, peak

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = 22
DIGESTS = {False: 0.85, True: 0.65}
"""Whether the Merkle root is computed on the way, and the least share of the copy's speed."""
NAIVE = 2.5
MOST = 500
"""MB above what the interpreter has with its modules."""
ROUNDS = 5
"""Their median: gigabytes of new files take a virtual machine one second or four, as its host has memory."""


def copy(source, target):
    subprocess.run(["cp", "-r", source, target], check=True)


def ours(source, target, *, digests):
    """To two tensor ranks from Hugging Face's layout, and to that from any other."""
    from plait.convert import checkpoint, layouts
    from plait.parallel.grid import Grid

    spec, model = layouts.opened(source)
    target.mkdir()
    if (source / "config.json").is_file():
        shutil.copyfile(source / "config.json", target / "hf_config.json")
        model.stream(checkpoint.lay_out(target, spec, Grid(tp=2), model.dtypes), digests=digests)
        checkpoint.write_tracker(target)
    else:
        model.stream(layouts.lay_out_hf(target, spec, model.dtypes), digests=digests)


MEGATRON = {
    "model.embed_tokens": "embedding.word_embeddings", "model.layers": "decoder.layers",
    "model.norm": "decoder.final_layernorm", "lm_head": "output_layer",
    "self_attn.q_proj": "self_attention.linear_qkv",
    "self_attn.o_proj": "self_attention.linear_proj", "mlp.gate_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2", "post_attention_layernorm": "pre_mlp_layernorm",
}  # fmt: skip
"""Its words for those of Hugging Face."""


def naive(source, target):
    """Load all, fuse, cut, torch.save: what converters of the field do."""
    import torch
    from safetensors.torch import load_file

    ranks = [{}, {}]
    for name, pieces in cut(load_file(source / "model.safetensors")):
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = piece.contiguous().clone()
    for number, rank in enumerate(ranks):
        place = target / f"mp_rank_{number:02d}"
        place.mkdir(parents=True)
        torch.save({"model": rank}, place / "model_optim_rng.pt")


def cut(state):
    """Each tensor's two parts, by Megatron's name."""
    import torch

    groups = CONFIG["num_key_value_heads"]
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name or "up_proj" in name:
            continue
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            whole = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
            pieces = whole.chunk(2)
        elif "gate_proj" in name:
            halves = zip(tensor.chunk(2), state[name.replace("gate", "up")].chunk(2), strict=True)
            pieces = [torch.cat(pair) for pair in halves]
        elif "o_proj" in name or "down_proj" in name:
            pieces = tensor.chunk(2, dim=1)
        else:
            pieces = [tensor, tensor] if tensor.dim() == 1 else tensor.chunk(2)
        for word, other in MEGATRON.items():
            name = name.replace(word, other)  # noqa: PLW2901
        yield name, pieces


def way(convert, inside, source, target):
    """A way of converting, timed from when its modules are there until all is on the disk.

    Memory is above what the process had then.
    """
    import plait.convert.layouts  # noqa: F401

    before, began = peak(), time.perf_counter()
    convert(source / inside, target / "out")
    os.sync()
    return Own(time.perf_counter() - began, peak() - before)


def made(root, seed):
    """A model of random bytes, and a digest of each tensor's."""
    import numpy as np

    from plait.models.specs import Spec
    from plait.models.weights import lay_out

    root.mkdir()
    config = {**CONFIG, "num_hidden_layers": LAYERS}
    (root / "config.json").write_text(json.dumps(config))
    spec = Spec.of(root)
    draw = np.random.default_rng(seed)
    digests = {}
    for name, one in lay_out(root, dict.fromkeys(spec.shapes, "bfloat16"), spec.shapes).items():
        content = draw.integers(0, 256, one.nbytes, dtype=np.uint8).tobytes()
        digests[name] = hashlib.sha256(content).hexdigest()
        with one.path.open("r+b") as file:
            file.seek(one.offset)
            file.write(content)
    (root.parent / "digests.json").write_text(json.dumps(digests))


def make(folder, seed, *, cut):
    made(folder / "hf", seed)
    if cut:
        ours(folder / "hf", folder / "cut", digests=False)
        shutil.rmtree(folder / "hf")


# What was written


def is_cut(source, mine, peer):
    """Each rank's file has the tensors that the straightforward way cuts, byte for byte."""
    import torch
    from safetensors import safe_open

    ranks = [torch.load(path, mmap=True, weights_only=False)["model"] for path in files(mine)]
    with safe_open(source / "hf" / "model.safetensors", "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    names = set()
    for name, pieces in cut(whole):
        names.add(name)
        for rank, piece in zip(ranks, pieces, strict=True):
            assert torch.equal(rank[name].view(torch.int16), piece.view(torch.int16)), name
    assert all(names == {name for name, one in rank.items() if torch.is_tensor(one)} for rank in ranks), names
    return f"{2 * len(names)} tensors compared"


def files(folder):
    return sorted(folder.rglob("model_optim_rng.pt"))


def is_whole(source, mine, peer):
    """Each tensor has the bytes that the model was made of before it was cut."""
    import torch
    from safetensors import safe_open

    wanted, found = json.loads((source / "digests.json").read_text()), {}
    for path in (mine / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                content = file.get_tensor(name).view(torch.uint8).numpy()
                found[name] = hashlib.sha256(content).hexdigest()
    assert found == wanted, sorted(
        name for name in {**wanted, **found} if found.get(name) != wanted.get(name)
    )
    return f"{len(found)} tensors compared"


CHECKS = {"hf": is_cut, "cut": is_whole}


def row(inside, name, cold, digests):
    mine, beside = (partial(way, one, inside) for one in (partial(ours, digests=digests), copy))
    name = f"convert-{name}-{'cold' if cold else 'warm'}{'-digests' if digests else ''}"
    source = partial(make, cut=inside == "cut")
    keys = {"per": "wall", "cold": cold, "rounds": ROUNDS, "most": MOST}
    return Row(name, DIGESTS[digests], source, mine, beside, CHECKS[inside], **keys)


STRAIGHT = Row(
    "convert-beside-torch-save",
    NAIVE,
    partial(make, cut=False),
    partial(way, partial(ours, digests=False), "hf"),
    partial(way, naive, "hf"),
    is_cut,
    per="wall",
    rounds=ROUNDS,
    most=MOST,
)
DIRECTIONS = (("hf", "to-tp2"), ("cut", "to-hf"))
ROWS = [
    *(row(*one, cold, digests) for one in DIRECTIONS for cold in (False, True) for digests in DIGESTS),
    STRAIGHT,
]
