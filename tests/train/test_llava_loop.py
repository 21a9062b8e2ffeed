"""LLaVA's losses and frozen parts on every grid, against a plain PyTorch loop over transformers."""

import json
from types import MappingProxyType

import numpy as np
import pytest
import torch
from makers import Maker
from talks import asked
from test_loop import AROUND, RUN, STEPS, lr_at
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from plait.convert import engine
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid
from plait.tokens.llava import LlavaRenderer
from plait.train.energon import PictureCollator
from plait.verify.ranks import run_ranks

FORM = {"template": "llava", "instruction": "keep", "language": "en", "picture_tokens": 9}
LENGTH, PAD = 64, 260
STAGE_1, STAGE_2 = ("language_model", "vision_model"), ("vision_model",)
GRIDS = [Grid(1, 1), Grid(2, 1), Grid(1, 2), Grid(1, 2, first=1), Grid(2, 2)]


def sample(number):
    """With one picture, two, or none; the last micro-batch of an iteration has none at all."""
    return asked(number, (2, 3, 0, 0)[number % 4])


class Samples:
    """Two sequences a micro-batch, two micro-batches an iteration."""

    total, micro, seq_length = 4, 2, LENGTH

    def __init__(self, folder, tokenizer, *, fixed, dp_rank=0, dp_size=1):
        self.renderer = LlavaRenderer(tokenizer, FORM)
        processor = AutoImageProcessor.from_pretrained(folder)
        self.collate = PictureCollator(LENGTH, fixed, PAD, processor, multiple=4)
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def batches(self, iteration):
        for first in range(iteration * 4 + 2 * self.dp_rank, iteration * 4 + 4, 2 * self.dp_size):
            encoded = [self.renderer.encode(sample(number)) for number in (first, first + 1)]
            yield self.collate(encoded)


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def folder(maker):
    return maker.llava()


@pytest.fixture(scope="module")
def plain(maker, folder):
    """The same data through transformers, torch's AdamW and nothing else; by what is frozen."""
    done = {}
    for frozen in (STAGE_1, STAGE_2):
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
        model.model.vision_tower.requires_grad_(False)
        model.model.language_model.requires_grad_("language_model" not in frozen)
        model.lm_head.requires_grad_("language_model" not in frozen)
        done[frozen] = train_plainly(model, Samples(folder, maker.image, fixed=False))
    return done


def train_plainly(model, samples):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": RUN["weight_decay"]},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-5)
    losses = []
    for step in range(STEPS):
        batches = list(samples.batches(step))
        tokens = sum(batch.loss_mask.sum() for batch in batches)
        total = 0.0
        for batch in batches:
            seen = {} if batch.pictures is None else {"pixel_values": batch.pictures}
            attended = (batch.input_ids != PAD).long()
            logits = model(input_ids=batch.input_ids, attention_mask=attended, **seen).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
            )
            part = (loss * batch.loss_mask.flatten()).sum() / tokens
            if part.requires_grad:  # stage 1 learns nothing where there is no picture
                part.backward()
            total += part.item()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def train_rank(folder, tokenizer, grid, frozen, path, keys=MappingProxyType({})):
    """The same run through Megatron on one rank; the names of this rank's weights that changed."""
    from megatron.core import parallel_state

    from plait.train.build import build_model, freeze, load_weights, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.state import TrainState

    run, spec = {**RUN, **keys}, Spec.of(folder)
    inner = build_model(spec, grid, dtype=torch.float32, run=run)
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    weights = engine.to_mcore(FolderTensors(folder), spec)
    load_weights(inner, dict(engine.cut(weights, spec, grid, *place)))
    before = {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}
    freeze([inner], frozen)
    model = wrap([inner], run)
    optimizer = optimizer_of(model, run)
    state = TrainState([inner], optimizer, schedule_of(optimizer, run, train_iters=STEPS, sequence=24))
    copy, copies = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    samples = Samples(folder, tokenizer, fixed=grid.pp > 1, dp_rank=copy, dp_size=copies)
    Trainer(model, state, samples, run, AROUND).train(STEPS, folder=path)
    return {name: not torch.equal(before[name], p) for name, p in inner.named_parameters()}


@pytest.mark.parametrize("frozen", [STAGE_1, STAGE_2], ids=["stage-1", "stage-2"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_losses_are_those_of_a_plain_loop_and_frozen_parts_stay_bit_equal(
    grid, frozen, maker, folder, plain, tmp_path
):
    ranks = run_ranks(train_rank, grid, folder, maker.image, grid, frozen, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], plain[frozen], atol=1e-5, rtol=0)
    changed = {name: moved for rank in ranks for name, moved in rank.items()}
    assert {name.partition(".")[0] for name in changed} == {
        "language_model",
        "vision_model",
        "vision_projection",
    }
    for name, moved in changed.items():
        assert moved == (name.partition(".")[0] not in frozen), name


@pytest.mark.parametrize("frozen", [(), ("vision_projection",), ("language_model",)], ids=str)
def test_any_other_part_may_be_frozen(frozen, maker, folder, tmp_path):
    """No stage's choice: nothing, the projector alone, the language model alone; over two stages."""
    grid = Grid(1, 2)
    ranks = run_ranks(train_rank, grid, folder, maker.image, grid, frozen, tmp_path)
    for changed in ranks:
        for name, moved in changed.items():
            assert moved == (name.partition(".")[0] not in frozen), name


WAYS = {
    "sequence parallel": (Grid(2, 1), {}, {"sequence_parallel": True}),
    "sequence parallel on four": (Grid(2, 2), {}, {"sequence_parallel": True}),
    "context parallel": (Grid(), {"cp": 2}, {"context_parallel_size": 2}),
    "distributed optimizer": (Grid(), {"copies": 2}, {"use_distributed_optimizer": True}),
    "layers again": (
        Grid(1, 2), {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("frozen", [STAGE_1, STAGE_2], ids=["stage-1", "stage-2"])
@pytest.mark.parametrize("name", WAYS)
def test_a_run_spread_in_any_way_is_the_plain_loop(name, frozen, maker, folder, plain, tmp_path):
    grid, world, keys = WAYS[name]
    ranks = run_ranks(train_rank, grid, folder, maker.image, grid, frozen, tmp_path, keys, **world)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], plain[frozen], atol=1e-5, rtol=0)
    for changed in ranks:
        for parameter, moved in changed.items():
            assert moved == (parameter.partition(".")[0] not in frozen), parameter


def test_stage_1_learns(plain):
    assert plain[STAGE_1][-1] < plain[STAGE_1][0] - 0.05
