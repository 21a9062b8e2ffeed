"""How far the layers, and the logits, of a Megatron artifact are from those of transformers.

Weights are the artifact's, in fp32; sums are taken in fp32 and in fp64, on both sides. Each side goes on with
what its own layers gave, so the logits are those of the whole model, and the first layer that is wrong shows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.verify.cases import Case
from plait.verify.states import PRECISIONS, Difference, Logits

TOLERANCES = {torch.float64: 1e-5, torch.float32: 3e-5}
"""By arithmetic, of a model of few layers. In fp64 the two differ by 1e-15, or by 1e-7 where a router takes
its softmax in fp32. In fp32 the rounding of transformers alone has reached 2e-5 of the largest logit of a
trained tiny model, against its own fp64."""
TIE = 1e-12
"""Of the largest logit: what rounding in fp64 can make of two that are equal, and far below any tolerance."""
FEW = 8
"""Layers up to which a tolerance is as it is; beyond, errors of the layers add up as a random walk does."""


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """How far states may be from the reference's after so many layers, as a part of the largest of them."""
    return TOLERANCES[dtype] * math.sqrt(max(1.0, depth / FEW))


def compare(inputs: list[Case], reference: Logits, found: Logits, *, depth: int) -> list[dict[str, Any]]:
    """One row a case: the largest differences and how many positions agree on the likeliest token.

    In fp64 the tolerance is absolute, in fp32 it grows with the largest logit. Of tokens whose
    logits are equal but for rounding in fp64, each is the likeliest.

    Args:
        inputs: the cases.
        reference: logits of transformers.
        found: logits of the artifact.
        depth: layers of the model.
    """
    rows = []
    for number, case in enumerate(inputs):
        pairs = {d: (reference[d][number], found[d][number]) for d in PRECISIONS}
        want, have = pairs[torch.float64]
        rounded = pairs[torch.float32]
        largest = float(want.abs().max())
        rows.append(
            {
                "case": case.name,
                "positions": case.input_ids.numel(),
                "max_abs_logit": largest,
                "max_abs_diff": float((want - have).abs().max()),
                "max_abs_diff_fp32": float((rounded[0] - rounded[1]).abs().max()),
                "top1_equal": _agreeing(want, have, TIE * max(1.0, largest)),
                "tolerance": tolerance(torch.float64, depth),
                "tolerance_fp32": tolerance(torch.float32, depth) * max(1.0, largest),
            }
        )
    return rows


def _agreeing(want: Tensor, have: Tensor, within: float) -> int:
    """At how many positions the token that one finds likeliest is as likely as any to the other."""
    chosen = want.gather(-1, have.argmax(-1, keepdim=True)).squeeze(-1)
    return int((chosen >= want.max(-1).values - within).sum())


def of_layers(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """One row a layer but the last, whose states are the logits: the largest differences over all cases."""
    return [
        {
            "layer": one.layer,
            "max_abs_state": one.largest,
            "max_abs_diff": one.by[torch.float64],
            "max_abs_diff_fp32": one.by[torch.float32],
            "tolerance": tolerance(torch.float64, one.layer + 1) * one.largest,
            "tolerance_fp32": tolerance(torch.float32, one.layer + 1) * one.largest,
        }
        for one in differences
    ]


def failures(logits: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """What is wrong with a comparison, in words; nothing if it holds. Of the layers it is the first."""
    wrong = [f"layer {row['layer']}: {_far(row)}; it is the first" for row in layers if not _near(row)]
    return wrong[:1] + [
        f"{row['case']}: {_far(row)}, {row['top1_equal']} of {row['positions']} likeliest tokens equal"
        for row in logits
        if not _near(row) or row["top1_equal"] != row["positions"]
    ]


def _near(row: Mapping[str, Any]) -> bool:
    """Whether both differences are within their tolerances; what is no number is not."""
    return bool(row["max_abs_diff"] <= row["tolerance"] and row["max_abs_diff_fp32"] <= row["tolerance_fp32"])


def _far(row: Mapping[str, Any]) -> str:
    return (
        f"max abs difference {row['max_abs_diff']:.3g} (tolerance {row['tolerance']:.3g}), "
        f"in fp32 {row['max_abs_diff_fp32']:.3g} (tolerance {row['tolerance_fp32']:.3g})"
    )
