"""SOLO's configuration: Mistral's, and the side of a patch."""

from typing import Any

from transformers import MistralConfig


class SoloConfig(MistralConfig):
    """A Mistral that also reads patches of pixels.

    Args:
        vision_patch_size: side of a patch, in pixels.
        vision_token_ids: ids of the tokens that stand for a picture, by name.
    """

    model_type = "solo"

    vision_patch_size: int = 32
    vision_token_ids: dict[str, int] | None = None


__all__ = ["SoloConfig"]
