"""Runs of tiny models of each recipe, spread in any way: their losses, gradients and weights, whole."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from talks import asked

from plait.config.run import Around, Run
from plait.convert import engine
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid
from plait.tokens import roles
from plait.tokens.indexed import Pack
from plait.tokens.llava import LlavaRenderer
from plait.train.batches import Collator, Feed, Order
from plait.verify.ranks import run_ranks

STEPS, BATCH, LENGTH, SIDE = 20, 4, 32, 4
SEEN = (1, STEPS)
"""Iterations whose gradients are kept."""
KEYS = {
    "model": "m", "mixture": "x", "train_iters": STEPS, "save_interval": STEPS, "params_dtype": "fp32",
    "lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 2, "global_batch_size": BATCH,
    "adam_eps": 1e-5,  # larger than rounding noise, which Adam would blow up
}  # fmt: skip
PAD = 260
FORM = {"template": "llava", "instruction": "keep", "language": "en", "picture_tokens": 9}


class Result(NamedTuple):
    """What a run did, by the names of Hugging Face's tensors."""

    losses: list[float]
    gradients: dict[int, dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Way:
    """A way to spread a run: the keys of `runs` that say so."""

    keys: dict[str, Any]

    @property
    def grid(self) -> Grid:
        axes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        return Grid(*(self.keys.get(axis, 1) for axis in axes))

    @property
    def world(self) -> dict[str, Any]:
        return {
            "copies": self.keys.get("data_parallel_size", 1),
            "cp": self.keys.get("context_parallel_size", 1),
            "ep": self.keys.get("expert_model_parallel_size", 1),
            "chunks": self.keys.get("virtual_pipeline_model_parallel_size"),
        }

    @property
    def pieces(self) -> int:
        """What a sequence's length is a multiple of."""
        cp = self.keys.get("context_parallel_size", 1)
        tensor = self.grid.tp if self.keys.get("sequence_parallel") else 1
        return tensor * (2 * cp if cp > 1 else 1)


@dataclass(frozen=True)
class Recipe:
    """A tiny model and its data.

    Attributes:
        name: the recipe.
        folder: the model, as Hugging Face's.
        feed: of a way, a data parallel rank and the number of them.
    """

    name: str
    folder: Path
    feed: Callable[[Way, int, int], Any]

    def settings(self, way: Way) -> dict[str, Any]:
        """All keys of the run, as planning accepts them."""
        return Run(**KEYS | way.keys, recipe=self.name).model_dump(mode="json")

    def run(self, way: Way, path: Path, settings: dict[str, Any] | None = None) -> Result:
        """Train it; ``settings`` stand in place of those that planning would accept."""
        settings = settings or self.settings(way)
        ranks = run_ranks(rank, way.grid, self, way, settings, path, **way.world)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
        return Result(
            [row["lm loss"] for row in rows],
            {step: self._whole(way, ranks, lambda found, at=step: found["gradients"][at]) for step in SEEN},
            self._whole(way, ranks, lambda found: found["weights"]),
        )

    def _whole(self, way, ranks, of):
        """Tensors of all ranks' chunks as Hugging Face's."""
        spec, grid = Spec.of(self.folder), way.grid.interleaved(way.world["chunks"] or 1)
        states = {
            (found["tp"], number * way.grid.pp + found["pp"]): {
                n: torch.from_numpy(t) for n, t in state.items()
            }
            for found in ranks
            for number, state in enumerate(of(found))
        }
        return dict(engine.to_hf(engine.join(states, spec, grid), spec))


def rank(recipe, way, settings, path):
    """The run on one rank."""
    from megatron.core import parallel_state

    from plait.train.build import DTYPES, build_chunks, freeze, load_cut, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.state import TrainState

    spec = Spec.of(recipe.folder)
    chunks = build_chunks(spec, way.grid, dtype=DTYPES[settings["params_dtype"]], run=settings)
    load_cut(chunks, engine.to_mcore(FolderTensors(recipe.folder), spec), spec, way.grid)
    freeze(chunks, settings["freeze"])
    model = wrap(chunks, settings)
    optimizer = optimizer_of(model, settings)
    gradients = kept_gradients(model)
    schedule = schedule_of(optimizer, settings, train_iters=STEPS, sequence=LENGTH)
    feed = recipe.feed(
        way, parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    )
    around = Around(peak_tflops=1.0).model_dump()
    Trainer(model, TrainState(chunks, optimizer, schedule), feed, settings, around).train(STEPS, folder=path)
    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "gradients": gradients,
        "weights": [
            {name: one.detach().numpy() for name, one in chunk.named_parameters()} for chunk in chunks
        ],
    }


def kept_gradients(model):
    """By iteration, each chunk's gradients as they are before they are clipped; filled while it trains."""
    kept, seen = {}, []
    finalize = model[0].config.finalize_model_grads_func

    def keep(chunks, *args, **keys):
        finalize(chunks, *args, **keys)
        seen.append(None)
        if len(seen) in SEEN:
            kept[len(seen)] = [whole_gradients(chunk) for chunk in chunks]

    for chunk in model:
        chunk.config.finalize_model_grads_func = keep
    return kept


def whole_gradients(chunk):
    """A chunk's gradients; where copies share them, those of all copies' shares. Frozen ones are zeros."""
    found = {name: np.zeros(tuple(one.shape), np.float32) for name, one in chunk.module.named_parameters()}
    names = {one: name for name, one in chunk.module.named_parameters()}
    for buffer in chunk.buffers:
        data = buffer.grad_data.clone()
        if chunk.ddp_config.use_distributed_optimizer:
            for bucket in buffer.buckets:
                gather(data[bucket.offset : bucket.offset + bucket.grad_data.numel()], chunk.dp_cp_group)
        for one, (start, end, _) in buffer.param_index_map.items():
            found[names[one]] = data[start:end].view(one.shape).numpy().copy()
    return found


def gather(data, group):
    """Every rank's share of a bucket, in place."""
    shares = data.chunk(torch.distributed.get_world_size(group))
    own = shares[torch.distributed.get_rank(group)].clone()
    torch.distributed.all_gather([*shares], own, group=group)


# Data


class Packs(list):
    """Packs in memory, of two or three documents, some with patches."""

    def __init__(self, count, *, patches):
        super().__init__(range(count))
        self.patches = patches

    def pack(self, number):
        draw = np.random.default_rng(number)
        text = draw.integers(3, 250, LENGTH - 4 + number % 4)
        role = np.full(len(text), roles.ASSISTANT)
        role[3:6], role[9], role[10:13] = roles.USER, roles.PACK_SEP, roles.USER
        rows, patches = np.full(len(text), -1), None
        if self.patches:
            rows[3 : 3 + number % 3] = np.arange(number % 3)
            patches = draw.normal(size=(number % 3, 3 * SIDE**2)).astype(np.float32)
        return Pack(text, role, rows, [], patches)


def packed(patches):
    """The feed of a recipe that packs."""
    collate = Collator(
        seq_length=LENGTH, pad_id=2, loss_roles=(roles.ASSISTANT,), no_loss_ids=(), patch_size=SIDE,
        max_resolution=64, vision=patches,
    )  # fmt: skip
    shard = Packs(24, patches=patches)

    def feed(way, dp_rank, dp_size):
        total = way.keys.get("global_batch_size", BATCH)
        order = Order((1.0,), (len(shard),), 5, STEPS * total)
        return Feed([shard], order, collate, 1, total, dp_rank, dp_size)

    return feed


def sample(number):
    """With one picture, two, or none; some micro-batches have none at all."""
    return asked(number, (1, 3, 0, 0, 0, 1, 0)[number % 7])


class Samples:
    """Sequences with pictures, one a micro-batch."""

    total, micro, seq_length = BATCH, 1, 64

    def __init__(self, tokenizer, processor, way, dp_rank, dp_size):
        from plait.train.energon import PictureCollator

        self.renderer = LlavaRenderer(tokenizer, FORM)
        fixed, pieces = way.grid.pp > 1, max(4, way.pieces)
        self.collate = PictureCollator(self.seq_length, fixed, PAD, processor, multiple=pieces)
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def batches(self, iteration):
        first = iteration * BATCH
        for number in range(first + self.dp_rank, first + BATCH, self.dp_size):
            yield self.collate([self.renderer.encode(sample(number))])


def recipes(maker):
    """All three, by name."""
    from transformers import AutoImageProcessor

    llava = maker.llava()
    processor = AutoImageProcessor.from_pretrained(llava)
    return {
        "chat": Recipe("chat", maker.hf(), packed(patches=False)),
        "solo": Recipe("solo", maker.solo(), packed(patches=True)),
        "llava": Recipe("llava", llava, lambda *place: Samples(maker.image, processor, *place)),
    }


# The reference


def lr_at(step):
    """Megatron's cosine with linear warmup."""
    warmup, high, low = KEYS["lr_warmup_iters"], KEYS["lr"], KEYS["min_lr"]
    if step <= warmup:
        return high * step / warmup
    return low + (high - low) * (1 + np.cos(np.pi * (step - warmup) / (STEPS - warmup))) / 2


def logits_of(recipe, model, batch):
    """What transformers computes of a micro-batch."""
    if recipe == "llava":
        seen = {} if batch.pictures is None else {"pixel_values": batch.pictures}
        attended = (batch.input_ids != PAD).long()
        return model(input_ids=batch.input_ids, attention_mask=attended, **seen).logits
    mask = torch.zeros(batch.attention_mask.shape).masked_fill(batch.attention_mask, float("-inf"))
    seen = {"vision_patches": batch.pictures, "vision_patch_indices": batch.picture_rows}
    return model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids,
        **(seen if recipe == "solo" else {}),
    ).logits  # fmt: skip


def plainly(recipe, frozen=()):
    """The same run by transformers, torch's AdamW and nothing else."""
    from transformers import AutoModelForImageTextToText, MistralForCausalLM

    from plait.models.remote.modeling_solo import SoloForCausalLM

    kinds = {"chat": MistralForCausalLM, "solo": SoloForCausalLM, "llava": AutoModelForImageTextToText}
    model = kinds[recipe.name].from_pretrained(
        recipe.folder, attn_implementation="eager", dtype=torch.float32
    )
    for name, one in model.named_parameters():
        one.requires_grad_(not any(part in name for part in frozen))
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    groups = [
        {"params": [one for one in trained.values() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in trained.values() if one.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=KEYS["adam_eps"])
    feed, losses, gradients = recipe.feed(Way({}), 0, 1), [], {}
    for step in range(STEPS):
        losses.append(backward(recipe.name, model, list(feed.batches(step))))
        if step + 1 in SEEN:
            gradients[step + 1] = {saved(name, recipe): one.grad.clone() for name, one in trained.items()}
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        torch.nn.utils.clip_grad_norm_([*trained.values()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Result(losses, gradients, {saved(name, recipe): one.detach() for name, one in trained.items()})


def saved(name, recipe):
    """A parameter's name in the model's folder."""
    if recipe.name != "llava":
        return name
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


def backward(recipe, model, batches):
    """The mean loss of the trained tokens of all micro-batches, and its gradients."""
    tokens, total = sum(batch.loss_mask.sum() for batch in batches), 0.0
    for batch in batches:
        logits = logits_of(recipe, model, batch).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
        part = (loss * batch.loss_mask.flatten()).sum() / tokens
        part.backward()
        total += part.item()
    return total
