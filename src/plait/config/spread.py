"""Ways to spread a run that do not go together: each is a row here, and refused in planning with its reason.

The tests provoke every row, and train each recipe in the ways of ``tests/train/test_matrix.py``: an axis or a
key alone, most pairs, some of three. What has no row and is none of these is accepted, and was not tried.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Keys = Mapping[str, Any]


class Row(NamedTuple):
    """What does not go together.

    Attributes:
        found: whether a run has it.
        why: the sentence, with places for the run's keys and ``micro_batches``.
    """

    found: Callable[[Keys], Any]
    why: str


REFUSED: dict[str, Row] = {
    "sequence parallel alone": Row(
        lambda run: run["sequence_parallel"] and run["tensor_model_parallel_size"] == 1,
        "`sequence_parallel` needs tensor_model_parallel_size 2 or more",
    ),
    "weights gathered of a whole optimizer": Row(
        lambda run: (
            run["overlap_param_gather"]
            and not (run["use_distributed_optimizer"] and run["overlap_grad_reduce"])
        ),
        "`overlap_param_gather` needs `use_distributed_optimizer` and `overlap_grad_reduce`",
    ),
    "a distributed optimizer without moments": Row(
        lambda run: run["use_distributed_optimizer"] and run["optimizer"] != "adam",
        "`use_distributed_optimizer` shares the state of `optimizer: adam` only, not of {optimizer!r}: "
        "Megatron Core saves no other",
    ),
    "experts of no processes": Row(
        lambda run: (
            run["data_parallel_size"] * run["context_parallel_size"] % run["expert_model_parallel_size"]
        ),
        "expert_model_parallel_size {expert_model_parallel_size} does not divide data_parallel_size "
        "{data_parallel_size} x context_parallel_size {context_parallel_size}, whose processes share them",
    ),
    "chunks of one stage": Row(
        lambda run: run["virtual_pipeline_model_parallel_size"] and run["pipeline_model_parallel_size"] == 1,
        "virtual_pipeline_model_parallel_size {virtual_pipeline_model_parallel_size} needs "
        "pipeline_model_parallel_size 2 or more: one stage waits for no other",
    ),
    "an odd micro-batch": Row(
        lambda run: (
            run["virtual_pipeline_model_parallel_size"]
            and run["micro_batches"] % run["pipeline_model_parallel_size"]
        ),
        "virtual_pipeline_model_parallel_size {virtual_pipeline_model_parallel_size} needs micro-batches in "
        "multiples of pipeline_model_parallel_size {pipeline_model_parallel_size}, and the run has "
        "{micro_batches}: global_batch_size {global_batch_size} / (micro_batch_size {micro_batch_size} x "
        "data_parallel_size {data_parallel_size})",
    ),
    "stages moved away": Row(
        lambda run: run["cpu_offloading_num_layers"] and run["pipeline_model_parallel_size"] > 1,
        "cpu_offloading_num_layers {cpu_offloading_num_layers} needs pipeline_model_parallel_size 1, not "
        "{pipeline_model_parallel_size}: Megatron Core moves no activations of pipeline stages",
    ),
    "a sequence of documents shared": Row(
        lambda run: run["transformer_impl"] == "transformer_engine" and run["context_parallel_size"] > 1,
        "context_parallel_size {context_parallel_size} needs transformer_impl local: Transformer Engine "
        "shares a sequence only where each of its documents divides into 2 x {context_parallel_size} pieces",
    ),
    "documents in fp32": Row(
        lambda run: (
            run["transformer_impl"] == "transformer_engine"
            and run["attention_backend"] in ("flash", "fused")
            and run["params_dtype"] == "fp32"
        ),
        "attention_backend {attention_backend!r} computes in bf16 or fp16, and params_dtype is fp32; unfused "
        "and auto compute in it",
    ),
    "angles of several sequences": Row(
        lambda run: run["apply_rope_fusion"] and run["micro_batch_size"] > 1,
        "`apply_rope_fusion` needs micro_batch_size 1, not {micro_batch_size}: its kernel knows the "
        "positions of one sequence, and packed ones differ",
    ),
    "a fused loss of equal bits": Row(
        lambda run: run["cross_entropy_loss_fusion"] and run["deterministic_mode"],
        "`cross_entropy_loss_fusion` does not give equal bits, and `deterministic_mode` asks for them",
    ),
    "moved away and computed again": Row(
        lambda run: run["cpu_offloading_num_layers"] and run["recompute_granularity"],
        "cpu_offloading_num_layers {cpu_offloading_num_layers} and recompute_granularity "
        "{recompute_granularity!r} exclude each other: activations are moved away or computed again",
    ),
}
"""Whatever the recipe: chat, solo and llava run in the same ways."""


def refused(run: Keys) -> str:
    """Why a run cannot be spread as its keys say, in a sentence; "" if it can."""
    stride = run["micro_batch_size"] * run["data_parallel_size"]
    keys = {**run, "micro_batches": run["global_batch_size"] // stride}
    return next((row.why.format_map(keys) for row in REFUSED.values() if row.found(keys)), "")


def undivided(run: Keys, layers: int, ends: Mapping[str, int | None]) -> str:
    """Why a model's layers do not divide as a run says, in a sentence; "" if they do.

    That they divide among the stages is checked where the model is cut.

    Args:
        run: the run's keys.
        layers: of the language model.
        ends: layers of the first and of the last pipeline stage, where stages are uneven.
    """
    stages, chunks = run["pipeline_model_parallel_size"], run["virtual_pipeline_model_parallel_size"] or 1
    given = [size for size in ends.values() if size] if stages > 1 else []
    factors = f"{layers} layers on pipeline_model_parallel_size {stages}"
    if chunks > 1:
        factors += f" x virtual_pipeline_model_parallel_size {chunks}"
        if given:
            return (
                f"{factors}: {' + '.join(map(str, given))} layers are given to the first or last stage, and "
                "only even stages are cut into chunks"
            )
        if layers % (stages * chunks):
            legal = [n for n in range(1, layers + 1) if layers % (stages * n) == 0]
            return f"{factors} do not divide; the latter may be {', '.join(map(str, legal)) or 'none'}"
    middle = (layers - sum(given)) // max(1, stages - len(given)) // chunks
    return _not_again(run, factors, {middle, *given} - {0}) or _not_moved(run, layers)


def _not_again(run: Keys, factors: str, sizes: set[int]) -> str:
    """Whole layers are computed again in pieces of one size."""
    piece = run["recompute_num_layers"]
    odd = [size for size in sorted(sizes) if run["recompute_method"] == "uniform" and size % piece]
    if not odd:
        return ""
    return (
        f"{factors} are {odd[0]} in one piece, which recompute_num_layers {piece} of recompute_method "
        "uniform does not divide"
    )


def _not_moved(run: Keys, layers: int) -> str:
    """A layer stays."""
    moved = run["cpu_offloading_num_layers"]
    if moved < layers:
        return ""
    return f"cpu_offloading_num_layers {moved} must be below the model's {layers} layers"
