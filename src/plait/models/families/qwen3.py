"""Qwen3: a norm over each query's and each key's head, and heads of a size of their own; no biases."""

from plait.models.families.family import BIASES, SILU, SLIDES, Family
from plait.models.families.qwen2 import DEFAULTS, WINDOWS

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={**DEFAULTS, "head_dim": 128},
    traits={"qk_norm": True},
    refused=(*BIASES, SILU, *SLIDES),
    inert=WINDOWS,
)
