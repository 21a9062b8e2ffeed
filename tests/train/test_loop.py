"""Losses of Megatron's loop on every grid, against a plain PyTorch loop over transformers."""

import json

import numpy as np
import pytest
import torch
from ties import stage_of
from transformers import MistralConfig, MistralForCausalLM

from plait.config.run import Around
from plait.convert import engine
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.tokens import roles
from plait.tokens.indexed import Pack
from plait.train.batches import Collator, Feed, Order
from plait.verify.ranks import run_ranks

STEPS = 6
AROUND = Around(peak_tflops=1.0).model_dump()
RUN = {
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 2,
    "lr_warmup_fraction": None,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-5,  # larger than rounding noise, which Adam would blow up
    "clip_grad": 1.0,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "lr_warmup_tokens": None,
    "lr_warmup_init": 0.0,
    "lr_decay_iters": None,
    "skip_train_iteration_range": (),
    "overlap_param_gather": False,
}
COLLATE = Collator(
    seq_length=24, pad_id=2, loss_roles=(2,), no_loss_ids=(), patch_size=4, max_resolution=8, vision=False
)


SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "initializer_range": 0.2, "attn_implementation": "eager",
}  # fmt: skip


class Shard(list):
    """Packs in memory, each of two documents, one of them a user's."""

    def pack(self, number):
        draw = np.random.default_rng(number)
        text = draw.integers(3, 40, 20 + number % 4)
        role = np.full(len(text), roles.ASSISTANT)
        role[3:6], role[9], role[10:13] = roles.USER, roles.PACK_SEP, roles.USER
        return Pack(text, role, np.full(len(text), -1), [], None)


@pytest.fixture(scope="module")
def model():
    config = MistralConfig(intermediate_size=48, sliding_window=None, **SIZES)
    torch.manual_seed(0)
    return MistralForCausalLM(config)


def feed(rank=0, size=1, steps=STEPS):
    total = RUN["global_batch_size"]
    return Feed([Shard(range(10))], Order((1.0,), (10,), 5, steps * total), COLLATE, 1, total, rank, size)


def lr_at(step, highest=RUN["lr"]):
    """Megatron's cosine with linear warmup, in samples."""
    warmup, total = RUN["lr_warmup_iters"], STEPS
    if step <= warmup:
        return highest * step / warmup
    part = (step - warmup) / (total - warmup)
    return RUN["min_lr"] + (highest - RUN["min_lr"]) * (1 + np.cos(np.pi * part)) / 2


@pytest.fixture(scope="module")
def plain(model):
    """The same run by a plain loop."""
    return plainly(model)


def plainly(model, skipped=(), before=None, lr=lr_at):
    """The same data through transformers, torch's AdamW and nothing else: losses, norms, weights.

    ``before`` gets each step and its optimizer, and gives the one that is used from there on.
    """
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": decayed, "weight_decay": RUN["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        if step + 1 in skipped:
            continue
        optimizer = before(step, optimizer) if before else optimizer
        batches = list(feed().batches(step))
        tokens = sum(batch.loss_mask.sum() for batch in batches)
        total = 0.0
        for batch in batches:
            mask = torch.zeros(batch.attention_mask.shape).masked_fill(batch.attention_mask, float("-inf"))
            logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
            )
            part = (loss * batch.loss_mask.flatten()).sum() / tokens
            part.backward()
            total += part.item()
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(start)
    return losses, norms, end


def train_rank(weights, config, grid, path, dtype=torch.float32, **keys):
    """The same run through Megatron on one rank; rows of the metrics and this rank's weights."""
    from megatron.core import parallel_state

    from plait.train.build import build_model, load_weights, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.state import TrainState

    run = {**RUN, **keys}
    spec = Spec.from_config(config)
    inner = build_model(spec, grid, dtype=dtype, run=run)
    tp, pp = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    load_weights(inner, stage_of(weights, spec, grid, tp, pp))
    model = wrap([inner], run)
    optimizer = optimizer_of(model, run)
    schedule = schedule_of(optimizer, run, train_iters=STEPS, sequence=24)
    dp = parallel_state.get_data_parallel_rank()
    ours = feed(dp, parallel_state.get_data_parallel_world_size())
    Trainer(model, TrainState([inner], optimizer, schedule), ours, run, AROUND).train(STEPS, folder=path)
    return (tp, pp), {
        name: parameter.detach().float().numpy() for name, parameter in inner.named_parameters()
    }


@pytest.mark.parametrize(("tp", "pp", "copies"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)])
def test_the_losses_are_those_of_a_plain_pytorch_loop(tp, pp, copies, model, plain, tmp_path):
    grid = Grid(tp=tp, pp=pp)
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    weights = model.state_dict()
    ranks = run_ranks(train_rank, grid, weights, config, grid, tmp_path, copies=copies)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses, norms, end = plain
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-5, rtol=0)
    assert np.allclose([row["grad norm"] for row in rows], norms, atol=1e-5, rtol=1e-5)
    assert np.allclose([row["learning-rate"] for row in rows], [lr_at(step) for step in range(STEPS)])
    spec = Spec.from_config(config)
    states = {place: {n: torch.from_numpy(w) for n, w in state.items()} for place, state in ranks}
    back = engine.to_hf(engine.join(states, spec, grid), spec)
    assert losses[-1] < losses[0] - 0.3
    assert max((back[name] - end[name]).abs().max().item() for name in end) < 1e-4


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2)], ids=str)
def test_bf16_parameters_with_fp32_masters_stay_near_the_plain_losses(grid, model, plain, tmp_path):
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    run_ranks(train_rank, grid, model.state_dict(), config, grid, tmp_path, torch.bfloat16)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], plain[0], atol=2e-2, rtol=0)


def skipping_rank(weights, config, path):
    return train_rank(weights, config, Grid(), path, skip_train_iteration_range=("3-3", "3-4"))


def test_seed_19_a_skipped_iteration_consumes_its_samples_and_moves_the_schedule(model, tmp_path):
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    run_ranks(skipping_rank, Grid(), model.state_dict(), config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses, norms, _ = plainly(model, skipped=(3, 4))

    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    assert [row.get("skipped samples") for row in rows] == [None, None, 4, 4, None, None]
    trained = [row for row in rows if "lm loss" in row]
    assert np.allclose([row["lm loss"] for row in trained], losses, atol=1e-5, rtol=0)
    assert np.allclose([row["grad norm"] for row in trained], norms, atol=1e-5, rtol=1e-5)
    assert np.allclose([row["learning-rate"] for row in trained], [lr_at(step) for step in (0, 1, 4, 5)])
