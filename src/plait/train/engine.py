"""Transformer Engine's layers, in place of Megatron Core's own; imported only where it is installed.

They fuse a norm into the projection behind it, so its weights have other names there (the rows of
:mod:`plait.convert.tables` have both) and the same ones in ``torch_dist`` checkpoints.

S = tokens of a sequence, B = sequences of a micro-batch, H = heads of a rank, D = head size.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

NORM = TENorm
"""The norm after the layers; those within are parts of projections."""


class DocumentAttention(TEDotProductAttention):  # type: ignore[misc]
    """Flash or fused attention within documents, which are laid end to end for it.

    Megatron's own way of packing lays them so for all of a layer, and counts positions anew by itself. Here
    it is done for attention alone: around it, sequences stay apart as in Megatron Core's own layers.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention [S, B, H x D] of queries, keys and values [S, B, H, D] within ``packed_seq_params``.

        Raises:
            ValueError: it is given a mask of tokens, which it would ignore, or no documents.
        """
        if attention_mask is not None or packed_seq_params is None:
            raise ValueError("attention by documents needs where they begin, and no mask of tokens")
        tokens, sequences = query.shape[:2]
        laid = (part.transpose(0, 1).reshape(-1, *part.shape[2:]) for part in (query, key, value))
        output: Tensor = super().forward(
            *laid,
            None,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=replace(packed_seq_params, qkv_format="thd"),
        )
        return output.reshape(sequences, tokens, -1).transpose(0, 1).contiguous()


ATTENTION = {
    True: (DocumentAttention, AttnMaskType.padding_causal),
    False: (TEDotProductAttention, AttnMaskType.arbitrary),
}
"""Attention by whether it is told where documents begin, and the kind of mask that it takes."""
OWN_NAMES = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
"""How checkpoints call the norms of Megatron Core's own layers: as those that are fused here.

A norm before experts is fused in neither, and only the former give it such a name.
"""


def layer_of(config: TransformerConfig, *, by_documents: bool) -> ModuleSpec:
    """A layer of a language model, whose attention is told where documents begin, or has a mask of tokens."""
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    attention = layer.submodules.self_attention
    core, mask = ATTENTION[by_documents]
    attention.submodules.core_attention = core
    attention.params = {"attn_mask_type": mask}
    layer.submodules.sharded_state_dict_keys_map |= OWN_NAMES
    return layer


def share_buffers(run: Mapping[str, Any], tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """Make the buffers through which tensor parallel ranks talk while they compute.

    Args:
        run: the run's settings.
        tokens: of a sequence.
        hidden: hidden size of the language model.
        dtype: type of its weights.
    """
    base = import_module("transformer_engine.pytorch.module.base")
    mode = base.UserBufferQuantizationMode.FP8 if run["fp8"] else base.UserBufferQuantizationMode.NONE
    base.initialize_ub(
        shape=[tokens * run["micro_batch_size"], hidden],
        tp_size=run["tensor_model_parallel_size"],
        quantization_modes=[mode],
        dtype=dtype,
        bootstrap_backend="nccl",
    )
