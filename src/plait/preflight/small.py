"""A run made small: its own keys, a model of its own kind with few layers and narrow ones, few processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from plait.config.run import AXES, FP8_TOKENS, NEEDS_ENGINE, Around, Run
from plait.models.specs import LLAVA, Spec
from plait.models.towers import Tower
from plait.train.hardware import NEEDS_GPU
from plait.train.job import Job

Values = dict[str, Any]

ENDS = ("first", "last")
HEAD = 8
LAYERS = 2
"""Layers of a stage."""
TOKENS = 64
PICTURED = 512
"""Tokens of a sequence that has a picture, a question and an answer, letter by letter."""
PATCHES, PATCH = 3, 8
"""Patches of a small picture's side, and pixels of a patch's side."""
DROPPED_AXES = ("data_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
"""Axes in the order in which they are given up where two on each are too many."""
EXPERTS = "expert_model_parallel_size"
ALONE: Values = {
    "start_run": None, "start_iteration": None, "finetune": True, "skip_train_iteration_range": [],
}  # fmt: skip
"""Keys by which a run depends on others, or leaves iterations out; here it starts anew."""
OUTSIDE: Values = {
    "eval_interval": None, "eval_mixture": None, "wandb_project": None, "network_interface": None,
    "gpu_ids": [], "nodes": 1, "non_persistent_save_interval": None,
}  # fmt: skip
"""Keys of what is around a run that reach beyond this machine, or need more iterations."""
HERE: Values = {"launch": "local", "log_interval": 1, "peak_tflops": 1.0}


@dataclass(frozen=True)
class Small:
    """A small run, and what of the real one is not in it.

    Attributes:
        settings: the run's settings.
        around: how it is started.
        model: the config.json of its model.
        sequence: tokens of a sequence.
        train_iters: the length that the learning rate is made for.
        notes: what is other than in the real run, in a line each.
    """

    settings: Values
    around: Values
    model: Values
    sequence: int
    train_iters: int
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, model: Mapping[str, Any], *, processes: int, length: int | None, gpu: bool) -> Self:
        """The small form of a run's job.

        Args:
            job: the run's first job.
            model: the config.json of its model.
            processes: as many as it may have.
            length: iterations of the run, where they are known.
            gpu: whether this machine has GPUs.
        """
        notes: list[str] = []
        settings = dict(job.settings)
        _fewer(settings, processes, notes)
        _changed(settings, {**ALONE, **({} if gpu else _of_gpus(settings))}, notes)
        around = {**job.around}
        _changed(around, OUTSIDE, notes)
        _narrow(settings)
        pieces = replace(job, settings=settings).pieces
        wanted = PICTURED if model["architectures"] == [LLAVA] else TOKENS
        sequence = -(-wanted // pieces) * pieces
        return cls(
            settings=settings,
            around={**around, **HERE},
            model=smaller(model, settings, sequence),
            sequence=sequence,
            train_iters=_length(settings, length, notes),
            notes=notes,
        )


def _fewer(settings: Values, processes: int, notes: list[str]) -> None:
    """Give up parallel sizes until the run has few enough processes."""
    real = {axis: settings[axis] for axis in AXES}
    if math.prod(real.values()) > processes:
        settings |= {axis: min(size, 2) for axis, size in real.items()}
    for axis in (*DROPPED_AXES, AXES[0]):
        if math.prod(settings[axis] for axis in AXES) > processes:
            settings[axis] = 1
    shared = settings["data_parallel_size"] * settings["context_parallel_size"]
    _changed(settings, {EXPERTS: math.gcd(settings[EXPERTS], shared)}, notes)
    notes += [f"{axis} {size} -> {settings[axis]}" for axis, size in real.items() if size != settings[axis]]
    if settings["tensor_model_parallel_size"] == 1:
        _changed(settings, {"sequence_parallel": False}, notes)


def _of_gpus(settings: Mapping[str, Any]) -> Values:
    """What keys for GPUs only are without one."""
    found: Values = {key: without for key, (without, _) in NEEDS_GPU.items()} | NEEDS_ENGINE
    if settings["params_dtype"] == "fp16":
        found["params_dtype"] = "bf16"
    return found


def _changed(settings: Values, wanted: Mapping[str, Any], notes: list[str]) -> None:
    """Set keys, and say which of them had another value."""
    for key, value in wanted.items():
        if settings[key] != value:
            notes.append(f"{key} {settings[key]} -> {'none' if value in (None, []) else value}")
            settings[key] = value


def _narrow(settings: Values) -> None:
    """Few layers, sequences and micro-batches; uneven stages stay uneven."""
    stages = settings["pipeline_model_parallel_size"]
    for end in ENDS:
        key = f"num_layers_in_{end}_pipeline_stage"
        settings[key] = 1 if settings[key] and stages > 1 else None
    if settings["recompute_num_layers"]:
        uneven = any(settings[f"num_layers_in_{end}_pipeline_stage"] for end in ENDS)
        settings["recompute_num_layers"] = min(settings["recompute_num_layers"], 1 if uneven else LAYERS)
    copies = settings["data_parallel_size"]
    times = settings["global_batch_size"] // (settings["micro_batch_size"] * copies)
    settings["micro_batch_size"] = min(settings["micro_batch_size"], 2)
    settings["global_batch_size"] = settings["micro_batch_size"] * copies * max(1, min(times, stages))


def _length(settings: Values, length: int | None, notes: list[str]) -> int:
    """Iterations of the run, or more than its warmup; one in tokens would be too long for small batches."""
    if settings["lr_warmup_tokens"]:
        _changed(settings, {"lr_warmup_tokens": None, "lr_warmup_fraction": 0.1}, notes)
    return max(2, length or int(settings["lr_warmup_iters"]) + 2)


def smaller(model: Mapping[str, Any], settings: Mapping[str, Any], sequence: int) -> Values:
    """The config.json of a model of the same kind, with the same vocabulary and queries for each key head.

    Args:
        model: the real one.
        settings: of the small run; its grid must divide the sizes.
        sequence: tokens of a sequence.
    """
    spec = Spec.from_config(model)
    heads = settings["tensor_model_parallel_size"] * spec.num_attention_heads // spec.num_key_value_heads
    head = FP8_TOKENS if settings["fp8"] else HEAD
    text = {
        "num_hidden_layers": _layers(settings),
        "num_attention_heads": heads,
        "num_key_value_heads": settings["tensor_model_parallel_size"],
        "head_dim": head,
        "hidden_size": heads * head,
        "intermediate_size": 2 * heads * head,
        "max_position_embeddings": sequence,
    }
    if spec.num_experts:
        share, ranks = max(2, spec.experts_per_token), settings[EXPERTS]
        text["num_local_experts"] = -(-share // ranks) * ranks
    if spec.sliding_window:
        text["sliding_window"] = min(spec.sliding_window, sequence // 2)
    if spec.vision is None:
        return {**model, **text}
    wide = {"projector_hidden_size": 2 * heads * head} if "projector_hidden_size" in model else {}
    return {
        **model,
        **wide,
        "text_config": {**model["text_config"], **text},
        "vision_config": {**model["vision_config"], **_tower(spec.vision, settings)},
    }


def _layers(settings: Mapping[str, Any]) -> int:
    """One for a stage that has a number of its own, as many as :data:`LAYERS` for the others."""
    uneven = [settings[f"num_layers_in_{end}_pipeline_stage"] for end in ENDS]
    own: list[int] = [size for size in uneven if size]
    return sum(own) + LAYERS * int(settings["pipeline_model_parallel_size"] - len(own))


def _tower(tower: Tower, settings: Mapping[str, Any]) -> Values:
    """A strip that is narrower than a patch stays one."""
    strip = min(tower.image_size % tower.patch_size, PATCH - 1)
    width = 2 * settings["tensor_model_parallel_size"] * HEAD
    return {
        "num_hidden_layers": 3,
        "num_attention_heads": 2 * settings["tensor_model_parallel_size"],
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "patch_size": PATCH,
        "image_size": PATCHES * PATCH + strip,
    }


KNOWN = {*Run.model_fields, *Around.model_fields}
assert {*ALONE, *OUTSIDE, *HERE} <= KNOWN
