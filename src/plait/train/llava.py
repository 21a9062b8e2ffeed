"""LLaVA on Megatron Core's blocks: a vision tower and a projector before the packed GPT.

Megatron Core's own ``CLIPViTModel`` refuses pictures whose side is no multiple of the patch (SigLIP
so400m: 384 = 27 x 14 + 6) and norms without Transformer Engine; its ``LLaVAModel`` puts features in place of
one token a picture and drops the losses around it. Here a picture has as many tokens as features, as in
transformers, so labels, masks and positions are those of any other text. Parameters keep the names of
Megatron's ``LLaVAModel``.

B = sequences of a micro-batch, S = tokens of a sequence, D = hidden size, I = pictures of a micro-batch,
T = features of a picture, W = width of the tower.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from megatron.core.activations import quick_gelu
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from plait.models.towers import Projector, Tower
from plait.train.model import PackedGPTModel

ACTIVATIONS: dict[str, Any] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class VisionTower(VisionModule):  # type: ignore[misc]
    """CLIP's or SigLIP's tower up to the layer whose output is projected; no norm after it."""

    def __init__(self, config: TransformerConfig, tower: Tower) -> None:
        """Build it on this rank; ``config`` has the tower's sizes."""
        super().__init__(config=config)
        self.tower = tower
        kind = {"dtype": config.params_dtype}
        side, width = tower.patch_size, tower.hidden_size
        self.conv1 = torch.nn.Conv2d(3, width, side, stride=side, bias=not tower.class_token, **kind)
        self.position_embeddings = torch.nn.Embedding(tower.positions, width, **kind)
        if tower.class_token:
            self.class_token = torch.nn.Parameter(torch.zeros(1, 1, width, **kind))
            self.ln_pre = torch.nn.LayerNorm(width, eps=tower.layer_norm_eps, **kind)
        self.model_type = ModelType.encoder_or_decoder
        layer = get_vit_layer_with_local_spec()
        layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
        self.decoder = TransformerBlock(config=config, spec=layer, pre_process=True, post_process=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [I, T, W] of normalised pictures [I, 3, side, side].

        A strip that is narrower than a patch at the right and bottom edge is not seen, as in transformers.
        """
        patches_IWhw = self.conv1(pictures.to(self.conv1.weight.dtype))
        hidden_ITW = patches_IWhw.flatten(2).transpose(1, 2)
        if self.tower.class_token:
            class_I1W = self.class_token.expand(len(hidden_ITW), -1, -1)
            hidden_ITW = torch.cat((class_I1W, hidden_ITW), dim=1)
        hidden_ITW = hidden_ITW + self.position_embeddings.weight
        if self.tower.class_token:
            hidden_ITW = self.ln_pre(hidden_ITW)
        features_TIW = self.decoder(hidden_ITW.transpose(0, 1).contiguous(), None)
        features_ITW: Tensor = features_TIW.transpose(0, 1)
        return features_ITW[:, 1:] if self.tower.class_token and self.tower.drop_class_token else features_ITW


class LlavaModel(MegatronModule):  # type: ignore[misc]
    """One pipeline stage: the first has tower and projector before its layers of the language model."""

    def __init__(
        self,
        language_model: PackedGPTModel,
        sight: tuple[VisionTower, MultimodalProjector] | None = None,
    ) -> None:
        """Join the parts; only the first stage has ``sight``, a tower and its projector."""
        super().__init__(config=language_model.config)
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder
        self.language_model = language_model
        if sight is not None:
            self.vision_model, self.vision_projection = sight

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding, or its copy, whose gradients Megatron sums up over first and last stage if tied."""
        weight: Tensor | None = self.language_model.shared_embedding_or_output_weight()
        return weight

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the stage before has sent."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        pictures: Tensor | None = None,
        picture_rows: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Losses [B, S] on the last stage if there are labels, else its logits, else hidden states.

        Args:
            input_ids: [B, S]; a picture is T times the picture's token.
            position_ids: [B, S].
            attention_mask: as :meth:`PackedGPTModel.forward` has it.
            pictures: [I, 3, side, side], read by the first stage.
            picture_rows: [B, S], a row of all pictures' features laid end to end, or -1.
            labels: [B, S], the next token.
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self.language_model.embedding(input_ids, position_ids)
            decoder_input = self._with_pictures(decoder_input, pictures, picture_rows)
        output: Tensor = self.language_model(
            input_ids, position_ids, attention_mask, decoder_input=decoder_input, labels=labels
        )
        return output

    def _with_pictures(self, tokens_SBD: Tensor, pictures: Tensor | None, rows_BS: Tensor | None) -> Tensor:
        """Features in the place of picture tokens.

        Without a picture what is trained still takes part, with weight 0: copies of the model gather its
        weights and reduce its gradients together, whatever each of them sees, and the backward pass of a
        frozen language model has where to end.
        """
        if pictures is None or rows_BS is None or not len(pictures):
            unchanged: Tensor = tokens_SBD + 0.0 * self.vision_projection(self._of_nothing(tokens_SBD)).mean()
            return unchanged
        features_ND = self.vision_projection(self.vision_model(pictures)).flatten(0, 1)
        rows_SB = rows_BS.t()
        found_SBD = features_ND[rows_SB.clamp(min=0)].to(tokens_SBD.dtype)
        return torch.where((rows_SB >= 0)[..., None], found_SBD, tokens_SBD).contiguous()

    def _of_nothing(self, like: Tensor) -> Tensor:
        """Features of a black picture; zeros from a frozen tower, which need not look."""
        tower = self.vision_model.tower
        if any(weight.requires_grad for weight in self.vision_model.parameters()):
            features: Tensor = self.vision_model(like.new_zeros(1, 3, tower.image_size, tower.image_size))
            return features
        return like.new_zeros(1, 1, tower.hidden_size)


def tower_sizes(tower: Tower) -> dict[str, Any]:
    """Megatron's config keys of a tower."""
    return {
        "num_layers": tower.used_layers,
        "hidden_size": tower.hidden_size,
        "num_attention_heads": tower.num_attention_heads,
        "num_query_groups": tower.num_attention_heads,
        "kv_channels": tower.head_dim,
        "ffn_hidden_size": tower.intermediate_size,
        "normalization": "LayerNorm",
        "layernorm_epsilon": tower.layer_norm_eps,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": False,
        "activation_func": ACTIVATIONS[tower.hidden_act],
        "pipeline_model_parallel_size": 1,
    }


def projector_sizes(projector: Projector, heads: int) -> dict[str, Any]:
    """Megatron's config keys of a projector; ``heads`` satisfies a check of Megatron's, nothing reads it."""
    return {
        "num_layers": 1,
        "hidden_size": projector.output_size,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "ffn_hidden_size": projector.hidden_size,
        "normalization": "LayerNorm",
        "add_bias_linear": projector.bias,
        "gated_linear_unit": False,
        "activation_func": F.gelu,
        "pipeline_model_parallel_size": 1,
    }


def projector_of(config: TransformerConfig, projector: Projector) -> MultimodalProjector:
    """Linear, GELU, Linear."""
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return MultimodalProjector(config, layers, "mlp", projector.input_size)
