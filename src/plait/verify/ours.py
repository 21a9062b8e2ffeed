"""Logits of a Megatron artifact on its tensor parallel ranks, with one layer of it in memory at a time.

Each layer is a pipeline stage of its own, built and computed where the stages of a longer pipeline would be.

B = sequences, S = tokens, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.cases import Case
from plait.verify.ranks import run_ranks
from plait.verify.states import PRECISIONS, Difference, Logits, States, worst

Loader = Callable[[Any, int], None]
"""Loads a layer of this rank's, and what stands beside it, into a stage that holds no other."""


def of_megatron(
    spec: Spec, tp: int, load: Loader, inputs: list[Case], states: States | None = None
) -> tuple[Logits, list[Difference]]:
    """Logits of a Megatron model, and how far its layers are from those that were kept.

    A model that is not cut is computed by two processes, which share the cases: where there is one,
    Megatron's reader takes no part of a tensor, for it must say who has the rest.

    Args:
        spec: the model's shape.
        tp: tensor parallel ranks; a process is forked for each.
        load: loads a layer.
        inputs: what to compute.
        states: what the reference's layers gave; None compares nothing.
    """
    ranks = run_ranks(_rank, Grid(tp), spec, tp, load, inputs, states, copies=max(1, 2 // tp))
    logits: Logits = {dtype: [torch.empty(0)] * len(inputs) for dtype in PRECISIONS}
    for found, _ in ranks:
        for (dtype, number), one in found.items():
            logits[dtype][number] = torch.from_numpy(one)
    return logits, [worst(of_layer) for of_layer in zip(*(given for _, given in ranks), strict=True)]


def _rank(
    spec: Spec, tp: int, load: Loader, inputs: list[Case], states: States | None
) -> tuple[dict[tuple[torch.dtype, int], Any], list[Difference]]:
    """What a rank computes: its copy's share of the cases, by arithmetic and number of the case."""
    from megatron.core import parallel_state

    from plait.train.build import build_model
    from plait.train.world import as_stage

    copy, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = range(copy, len(inputs), copies)
    given: dict[tuple[torch.dtype, int], Tensor] = {}
    differences = []
    for layer in range(spec.num_layers):
        whole = {}
        with as_stage(layer, spec.num_layers), torch.no_grad():
            for dtype in PRECISIONS:
                stage = build_model(spec, Grid(tp, spec.num_layers), dtype=dtype).eval().to(dtype)
                load(stage, layer)
                for key in ((dtype, number) for number in mine):
                    given[key], whole[key] = _layer(stage, inputs[key[1]], given.get(key), spec)
        if states is not None and layer < spec.num_layers - 1:
            differences.append(states.differences(layer, whole))
    return {key: one.numpy() for key, one in given.items()}, differences


def _layer(stage: Any, case: Case, before: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """What a stage gives to the next, or the logits [B, S, V]; and the same whole, [B, S, ...].

    Args:
        stage: the layer.
        case: the input.
        before: what the stage before gave, as Megatron sends it; None before the first.
        spec: the model.
    """
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    from plait.train.batches import masked_out, positions

    if before is not None:
        stage.set_input_tensor(before)
    output = stage(
        case.input_ids,
        torch.from_numpy(positions(case.documents.numpy())),
        masked_out(case.documents, spec.sliding_window),
        pictures=case.pictures,
        picture_rows=case.picture_rows,
    )
    if stage.post_process:
        logits_BSV = gather_from_tensor_model_parallel_region(output)[..., : spec.vocab_size].contiguous()
        return logits_BSV, logits_BSV
    parted = stage.config.sequence_parallel
    whole_SBD = gather_from_sequence_parallel_region(output) if parted else output
    return output, whole_SBD.transpose(0, 1)
