"""SOLO: one transformer that reads text tokens and patches of pixels alike.

Shapes: b = sequences, s = tokens, d = hidden size, n = patches of all pictures of the batch,
p = values of a patch (3 x side x side).
"""

from typing import Any

import torch
from torch import nn
from transformers import MistralForCausalLM, MistralModel

from .configuration_solo import SoloConfig


class SoloModel(MistralModel):
    """A Mistral whose embedding of a patch token also holds the projected pixels."""

    config_class = SoloConfig

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self.embed_vision_patch = nn.Linear(3 * config.vision_patch_size**2, config.hidden_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        vision_patches: torch.FloatTensor | None = None,
        vision_patch_indices: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ):
        """Run the layers.

        Args:
            input_ids: [b, s].
            vision_patches: [n, p], normalised; None where no sequence has a picture.
            vision_patch_indices: [b, s], a row of ``vision_patches``, or -1 where a token is no patch.
            inputs_embeds: [b, s, d], instead of ``input_ids``.
        """
        if vision_patches is not None and len(vision_patches):
            if vision_patch_indices is None:
                raise ValueError("vision_patches need vision_patch_indices, which say where they stand")
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
            inputs_embeds = inputs_embeds + self.patch_embeddings(vision_patches, vision_patch_indices)
            input_ids = None
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def patch_embeddings(self, patches: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Projected patches [b, s, d]; zero where the index is -1, which finds the row put last."""
        projected = self.embed_vision_patch(patches.to(self.embed_vision_patch.weight))
        rows = torch.cat((projected, projected.new_zeros(1, projected.shape[1])))
        return rows[indices.to(rows.device)]


class SoloForCausalLM(MistralForCausalLM):
    """SOLO with its output layer."""

    config_class = SoloConfig

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self.model = SoloModel(config)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids,
        is_first_iteration=False,
        vision_patches=None,
        vision_patch_indices=None,
        **kwargs: Any,
    ):
        """Pictures belong to the prompt: once it is in the cache they are not read again."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if vision_patches is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            inputs["vision_patches"] = vision_patches
            inputs["vision_patch_indices"] = _as_long_as(inputs["input_ids"], vision_patch_indices)
        return inputs

    def _expand_inputs_for_generation(self, *args: Any, vision_patches=None, **kwargs: Any):
        """Beams share the batch's patches: only the indices, one row a sequence, are repeated."""
        input_ids, kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        if vision_patches is not None:
            kwargs["vision_patches"] = vision_patches
        return input_ids, kwargs


def _as_long_as(input_ids: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Indices of the same tokens as ``input_ids``: generated tokens are no patches."""
    new = input_ids.shape[1] - indices.shape[1]
    return nn.functional.pad(indices, (0, new), value=-1) if new > 0 else indices[:, -input_ids.shape[1] :]


__all__ = ["SoloForCausalLM", "SoloModel"]
