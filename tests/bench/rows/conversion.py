"""Conversion beside copying, and beside the straightforward way: load all, map, `torch.save`.

A Llama-shaped bf16 model of about 2 GB goes from Hugging Face's layout to two tensor ranks and back, from
warm and from cold files; the copy is `cp -r` of the same bytes.
"""

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


def naive(source, target):
    """Load all, fuse, cut, torch.save: what converters of the field do."""
    import torch
    from safetensors.torch import load_file

    state = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    groups = config["num_key_value_heads"]
    ranks = [{}, {}]
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
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = piece.contiguous().clone()
    for number, rank in enumerate(ranks):
        place = target / f"mp_rank_{number:02d}"
        place.mkdir(parents=True)
        torch.save({"model": rank}, place / "model_optim_rng.pt")


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
    """A model of random bytes."""
    import numpy as np

    from plait.models.specs import Spec
    from plait.models.weights import lay_out

    root.mkdir()
    config = {**CONFIG, "num_hidden_layers": LAYERS}
    (root / "config.json").write_text(json.dumps(config))
    spec = Spec.of(root)
    draw = np.random.default_rng(seed)
    for one in lay_out(root, dict.fromkeys(spec.shapes, "bfloat16"), spec.shapes).values():
        with one.path.open("r+b") as file:
            file.seek(one.offset)
            file.write(draw.integers(0, 256, one.nbytes, dtype=np.uint8).tobytes())
    return root


def make(folder, seed, *, cut):
    made(folder / "hf", seed)
    if cut:
        ours(folder / "hf", folder / "cut", digests=False)
        shutil.rmtree(folder / "hf")


def row(inside, name, cold, digests):
    mine, beside = (partial(way, one, inside) for one in (partial(ours, digests=digests), copy))
    name = f"convert-{name}-{'cold' if cold else 'warm'}{'-digests' if digests else ''}"
    source = partial(make, cut=inside == "cut")
    return Row(name, DIGESTS[digests], source, mine, beside, per="wall", cold=cold, rounds=ROUNDS)


STRAIGHT = Row(
    "convert-beside-torch-save",
    NAIVE,
    partial(make, cut=False),
    partial(way, partial(ours, digests=False), "hf"),
    partial(way, naive, "hf"),
    per="wall",
)
DIRECTIONS = (("hf", "to-tp2"), ("cut", "to-hf"))
ROWS = [
    *(row(*one, cold, digests) for one in DIRECTIONS for cold in (False, True) for digests in DIGESTS),
    STRAIGHT,
]
