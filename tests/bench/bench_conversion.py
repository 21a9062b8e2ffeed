"""Conversion beside copying: ``python tests/bench/bench_conversion.py [LAYERS]``.

A Llama-shaped bf16 model of about 2 GB (22 layers) goes from Hugging Face's layout to two tensor ranks and
back, from warm and from cold files. Beside it are `cp -r` of the same bytes and the straightforward way: load
all, map, `torch.save`. Each is a process of its own, timed from when its modules are there until `sync` ends;
memory is above what the process had then. Ratios are of the copy's time, the median of three rounds in turn.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peaks import peak

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
ROUNDS = 3
WAYS = {"no digests": 0.85, "digests": 0.65}
"""Ours, and the least share of the copy's speed that it is to have."""
NAIVE = 2.5


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


WAYS_OF = {
    "cp": copy,
    "naive": naive,
    "no digests": lambda source, target: ours(source, target, digests=False),
    "digests": lambda source, target: ours(source, target, digests=True),
}


def child(way, source, target):
    """In a process of its own: seconds, and GB above the interpreter."""
    import numpy  # noqa: F401, ICN001 - loaded before the clock starts
    import torch  # noqa: F401

    import plait.convert.layouts  # noqa: F401

    before = peak()
    began = time.perf_counter()
    WAYS_OF[way](Path(source), Path(target))
    os.sync()
    seconds = time.perf_counter() - began
    print(seconds, peak() - before)  # noqa: T201


def measured(way, source, target, *, cold):
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                if cold:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(1 << 24):
                        pass
    words = [sys.executable, __file__, "child", way, source, target]
    ended = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds, memory = map(float, ended.stdout.split())
    return seconds, memory


def made(root, layers):
    """A model of random bytes."""
    import numpy as np

    from plait.models.specs import Spec
    from plait.models.weights import lay_out

    root.mkdir()
    config = {**CONFIG, "num_hidden_layers": layers}
    (root / "config.json").write_text(json.dumps(config))
    spec = Spec.of(root)
    draw = np.random.default_rng(layers)
    for one in lay_out(root, dict.fromkeys(spec.shapes, "bfloat16"), spec.shapes).values():
        with one.path.open("r+b") as file:
            file.seek(one.offset)
            file.write(draw.integers(0, 256, one.nbytes, dtype=np.uint8).tobytes())
    return root


def row(name, seconds, copied, memory, least):
    ratio = copied / seconds
    word = "" if least is None else f"{least:.2f}{'' if ratio >= least else '  missed'}"
    print(f"{name:34}{seconds:8.2f}{ratio:10.2f}{memory:12.2f}   {word}")  # noqa: T201


def main(layers):
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_ROOT")) as temporary:
        root = Path(temporary)
        hf = made(root / "hf", layers)
        cut = root / "cut"
        ours(hf, cut, digests=False)
        print(f"{'conversion':34}{'seconds':>8}{'of cp':>10}{'GB above':>12}   at least")  # noqa: T201
        for source, what in ((hf, "HF -> tp2"), (cut, "tp2 -> HF")):
            for cold in (False, True):
                ways = [one for one in WAYS_OF if one != "naive" or (source == hf and not cold)]
                found = {way: [] for way in ways}
                for _ in range(ROUNDS):
                    for way in ways:
                        found[way].append(measured(way, source, root / "out", cold=cold))
                shutil.rmtree(root / "out")
                times = {way: statistics.median(s for s, _ in some) for way, some in found.items()}
                for way, some in found.items():
                    name = f"{what}, {'cold' if cold else 'warm'}, {way}"
                    row(name, times[way], times["cp"], max(m for _, m in some), WAYS.get(way))
                if "naive" in times:
                    ratio = times["naive"] / times["no digests"]
                    print(f"{'':34}{ratio:.1f} times the straightforward way's speed, at least {NAIVE}")  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 22)
