"""LLaVA's losses and frozen parts on every grid, against a plain PyTorch loop over transformers."""

import importlib
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
    return {frozen: plainly_of(folder, maker, frozen) for frozen in (STAGE_1, STAGE_2)}


def plainly_of(folder, maker, frozen):
    """Losses of transformers' model with some parts frozen."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_("language_model" not in frozen)
    model.lm_head.requires_grad_("language_model" not in frozen)
    return train_plainly(model, Samples(folder, maker.image, fixed=False))


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
    inner, before = _trained(folder, tokenizer, grid, frozen, path, keys)
    return {name: not torch.equal(before[name], p) for name, p in inner.named_parameters()}


def _trained(folder, tokenizer, grid, frozen, path, keys):
    """This rank's model after the run, and its weights before."""
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
    return inner, before


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


# A language model whose output layer is its embedding

TIED = [
    pytest.param("Qwen2", Grid(), STAGE_2, marks=pytest.mark.long),
    pytest.param("Qwen2", Grid(1, 2), STAGE_2),
    pytest.param("Qwen2", Grid(1, 2), STAGE_1, marks=pytest.mark.long),
    pytest.param("Qwen2", Grid(2, 2), STAGE_2, marks=pytest.mark.long),
    pytest.param("Llama", Grid(2, 1), STAGE_2, marks=pytest.mark.long),
    pytest.param("Llama", Grid(1, 2), STAGE_2, marks=pytest.mark.long),
]
SHARED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
ENDS = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


@pytest.fixture(scope="module")
def tied(maker):
    """Tied models by family, and what the plain loop makes of them; transformers ties them itself."""
    done = {}

    def make(kind, frozen):
        if (kind, frozen) not in done:
            folder = maker.tied_llava(kind)
            assert "language_model.lm_head.weight" not in FolderTensors(folder)
            done[kind, frozen] = folder, plainly_of(folder, maker, frozen)
        return done[kind, frozen]

    return make


def ends_of_rank(folder, tokenizer, grid, frozen, path, keys=MappingProxyType({})):
    """This rank's embedding and output layer after the run."""
    inner, _ = _trained(folder, tokenizer, grid, frozen, path, keys)
    return {name: p.detach().numpy() for name, p in inner.named_parameters() if name in ENDS}


@pytest.mark.parametrize(("kind", "grid", "frozen"), TIED, ids=str)
def test_a_tied_llava_is_trained_as_the_plain_loop_trains_it(kind, grid, frozen, maker, tied, tmp_path):
    folder, losses = tied(kind, frozen)
    ranks = run_ranks(ends_of_rank, grid, folder, maker.image, grid, frozen, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-5, rtol=0)
    assert losses[-1] < losses[0] - 0.05
    for first, last in zip(ranks[: grid.tp], ranks[-grid.tp :], strict=True):
        assert ENDS[0] in first
        assert (ENDS[1] in last) == (grid.pp > 1)
        assert grid.pp == 1 or np.array_equal(first[ENDS[0]], last[ENDS[1]])


@pytest.mark.long
def test_copies_of_a_tied_llava_share_what_its_ends_learn(maker, tied, tmp_path):
    folder, losses = tied("Llama", STAGE_2)
    grid = Grid(1, 2)
    ranks = run_ranks(ends_of_rank, grid, folder, maker.image, grid, STAGE_2, tmp_path, SHARED, copies=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-5, rtol=0)
    first, last = ([rank[end] for rank in ranks if end in rank] for end in ENDS)
    assert (len(first), len(last)) == (2, 2)
    assert all(np.array_equal(first[0], one) for one in (*first, *last))


@pytest.mark.long
def test_a_copy_of_a_tied_llava_that_is_not_summed_up_would_show(maker, tied, monkeypatch, tmp_path):
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    monkeypatch.setattr(finalize, "_allreduce_word_embedding_grads", lambda *_, **__: None)
    folder, losses = tied("Qwen2", STAGE_2)
    grid = Grid(1, 2)
    (first, last) = run_ranks(ends_of_rank, grid, folder, maker.image, grid, STAGE_2, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert not np.allclose([row["lm loss"] for row in rows], losses, atol=1e-4, rtol=0)
    assert not np.array_equal(first[ENDS[0]], last[ENDS[1]])
