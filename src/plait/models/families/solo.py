"""SOLO: a Mistral that also reads patches of pixels."""

from dataclasses import replace

from plait.models.families.family import Field
from plait.models.families.mistral import MISTRAL

PATCH = Field(
    "vision_patch_size",
    "patch_dim",
    into=lambda side: 3 * side**2,
    back=lambda values: round((values / 3) ** 0.5),
)
SOLO = replace(
    MISTRAL,
    architecture="SoloForCausalLM",
    model_type="solo",
    fields=(*MISTRAL.fields, PATCH),
    inert=frozenset(("vision_token_ids",)),
)
