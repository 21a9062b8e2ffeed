"""Mixtral: Mistral's attention, and experts in place of the feed-forward network."""

from collections.abc import Mapping
from typing import Any

from plait.errors import CheckpointError
from plait.models.families.family import BIASES, FIELDS, FULL, SILU, WINDOW, Family, Field, Refused
from plait.models.families.mistral import DEFAULTS


def check_experts(found: Mapping[str, Any], where: str) -> None:
    """Refuse numbers of experts that Megatron's router does not weigh as Mixtral does."""
    experts, chosen = found["num_experts"], found["experts_per_token"]
    if not 2 <= chosen <= experts:
        raise CheckpointError(
            f"{where} sends a token to {chosen} of {experts} experts; Megatron's router weighs 2 or more",
            hint="num_experts_per_tok is from 2 to num_local_experts",
        )


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    defaults={
        **DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": None,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    fields=(
        *FIELDS,
        WINDOW,
        Field("num_local_experts", "num_experts", optional=True),
        Field("num_experts_per_tok", "experts_per_token", optional=True),
    ),
    refused=(
        *BIASES,
        SILU,
        FULL,
        Refused("router_jitter_noise", bool, "has router_jitter_noise, which plait does not train with"),
    ),
    theta=1_000_000.0,
    check=check_experts,
)  # fmt: skip
