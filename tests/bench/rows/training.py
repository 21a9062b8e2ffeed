"""A step of training beside a plain PyTorch loop over transformers, on the same packs and threads."""

import contextlib
import json
import os
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from tests.bench.harness import Own, Row

ITERATIONS, SKIPPED = 8, 2
"""Iterations, and how many of them, in which memory is found and kernels are chosen, do not count."""
SHAPES = {
    "tiny": ({"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}, 4, 256, 8),
    "60m": ({"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}, 12, 512, 4),
}
"""Sizes of a Llama, its heads of 64, tokens of a pack, and packs of a step."""
MOST_APART = 1e-3
"""Between losses of fp32, in any step."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def make(folder, seed, *, shape, dtype, iterations=ITERATIONS):
    """A project with packed text and an untrained model of the shape."""
    from jobs import packs, saved
    from makers import Maker
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes, heads, sequence, batch = SHAPES[shape]
    maker = Maker(folder / "made")
    hf = maker.foreign(
        "Llama", name=f"-{shape}", num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=sequence, **sizes,
    )  # fmt: skip
    lines = [
        json.dumps({"messages": [{"role": "assistant", "content": f"{seed} {n} {n * n} " * (n % 9 + 1)}]})
        for n in range(40 * sequence // 16)
    ]
    keys = {"train_iters": iterations, "global_batch_size": batch, "micro_batch_size": batch, "lr": 1e-4}
    place = packs(
        folder, maker, hf, maker.plain, [line.encode() for line in lines],
        limit=sequence, hidden_dropout=0.0, params_dtype=dtype, seed=seed, lr_decay_style="constant", **keys,
    )  # fmt: skip
    known = {"settings": place.settings, "start": place.start, "target": saved(iterations), "hf": str(hf)}
    (folder / "known.json").write_text(json.dumps(known))


@contextlib.contextmanager
def inside(folder):
    """The project as the working folder, and what it knows."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield json.loads(Path("known.json").read_text())
    finally:
        os.chdir(before)


def trains(known, **around):
    """The rank that `plait train` starts, in this process; its rows."""
    from plait.config.run import Around, Asked
    from plait.train import rank
    from plait.train.job import Job

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    inputs = known["start"], "data/analysis/x", "data/ckpts/r/schedule.json"
    keys = Around(peak_tflops=1.0, **around).model_dump(mode="json")
    asked = Asked(until=known["settings"]["train_iters"]).model_dump(mode="json")
    rank.run_rank(Job(*inputs, known["target"], known["settings"], keys, asked))
    lines = Path("data/ckpts/r/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ours(source, target):
    """The median step of the rank that `plait train` starts, from one's beginning to the next one's.

    So metrics, the log of samples and agreeing on signals are in it.
    """
    from plait.train import loop

    began, train = [], loop.Trainer._row

    def row(trainer):
        began.append(time.perf_counter())
        return train(trainer)

    loop.Trainer._row = row
    with inside(source) as known:
        rows = trains(known)
    (target / "losses.json").write_text(json.dumps([row["lm loss"] for row in rows]))
    return Own(statistics.median(after - before for before, after in pairwise(began[SKIPPED:])))


def plain(source, target):
    """The median step of transformers' model, torch's fused AdamW and nothing else."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with inside(source) as known:
        run = known["settings"]
        model = AutoModelForCausalLM.from_pretrained(known["hf"], dtype=DTYPES[run["params_dtype"]])
        feed, seconds, losses = batches_of(run), [], []
        parameters = list(model.parameters())
        keys = {"betas": (run["adam_beta1"], run["adam_beta2"]), "weight_decay": run["weight_decay"]}
        optimizer = torch.optim.AdamW(parameters, lr=0.0, eps=run["adam_eps"], fused=True, **keys)
        for step in range(ITERATIONS):
            began = time.perf_counter()
            losses.append(stepped(model, optimizer, feed, step, run))
            seconds.append(time.perf_counter() - began)
    (target / "losses.json").write_text(json.dumps(losses))
    return Own(statistics.median(seconds[SKIPPED:]))


def stepped(model, optimizer, feed, step, run):
    """One step; its loss, each token's weighed alike."""
    import torch

    batches = list(feed.batches(step))
    tokens = sum(batch.loss_mask.sum() for batch in batches)
    whole = 0.0
    for batch in batches:
        mask = torch.zeros(batch.attention_mask.shape, dtype=model.dtype)
        mask = mask.masked_fill(batch.attention_mask, float("-inf"))
        logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        part = (loss * batch.loss_mask.flatten()).sum() / tokens
        part.backward()
        whole += part.item()
    for group in optimizer.param_groups:
        group["lr"] = run["lr"] * min(step / max(run["lr_warmup_iters"], 1), 1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip_grad"])
    optimizer.step()
    optimizer.zero_grad()
    return whole


def batches_of(run):
    """The micro-batches that `plait train` reads, by its own reader."""
    from plait.tokens import roles
    from plait.tokens.indexed import PackedShard
    from plait.train.batches import Collator, Feed, Order

    (folder,) = Path("data/megatron_format").glob("*/shard_00000")
    shard = PackedShard(folder)
    sequence = int(folder.parent.name.rpartition("pack")[2])
    collate = Collator(
        seq_length=sequence, pad_id=2, loss_roles=(roles.ASSISTANT,), no_loss_ids=(), patch_size=4,
        max_resolution=8, vision=False,
    )  # fmt: skip
    order = Order((1.0,), (len(shard),), run["seed"], ITERATIONS * run["global_batch_size"])
    return Feed([shard], order, collate, run["micro_batch_size"], run["global_batch_size"], 0, 1)


def alike(_, ours, peer, *, dtype):
    """Both have trained the same: losses of fp32 are near each other; of bf16 the first two steps' are.

    A plain loop in bf16 adds its steps to numbers that are rounded to 8 bits: it is the fastest there is, and
    learns less than with masters in fp32, which Megatron keeps.
    """
    one, other = (json.loads((folder / "losses.json").read_text()) for folder in (ours, peer))
    away = [abs(a - b) for a, b in zip(one, other, strict=True)]
    assert max(away[:2]) < 0.005 * max(other), f"losses {one} and {other}"
    assert dtype != "fp32" or max(away) < MOST_APART, f"losses {one} and {other}"
    return f"losses apart by {max(away[:2]):.2g} in the first steps, by {max(away):.2g} in all"


def row(shape, dtype):
    makes, check = partial(make, shape=shape, dtype=dtype), partial(alike, dtype=dtype)
    return Row(f"step-{shape}-{dtype}", 1.0, makes, ours, plain, check, per="wall")


ROWS = [row(shape, dtype) for shape in SHAPES for dtype in DTYPES]
