"""The layers of a language model: Megatron Core's own, or Transformer Engine's.

Without that, Megatron Core's refuse sequence and context parallelism: here they do not.

S = tokens of a sequence, C = context parallel ranks, B = sequences of a micro-batch, A = attention heads,
H = head size.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plait.parallel.grid import context_rows
from plait.train import kernels

NORMS = {"RMSNorm": kernels.RMSNorm, "LayerNorm": torch.nn.LayerNorm}


class Norm:
    """Torch's norm; under sequence parallelism its gradients are summed over the tensor parallel ranks.

    Megatron's ``WrappedTorchNorm`` is the same without that mark, and refuses sequence parallelism.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        """The norm that the config names, marked."""
        norm: torch.nn.Module = NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class ContextAttention(DotProductAttention):  # type: ignore[misc]
    """Attention in which each rank has its own queries [S/C, ...] and every rank's keys.

    A CPU that has whole sequences attends inside of their documents. Else torch's kernel, which keeps no
    scores, does what Megatron's layer does in several steps; that is left for what drops some of them.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """Take DotProductAttention's arguments, but for its refusal of context parallelism."""
        self.ranks = config.context_parallel_size
        super().__init__(replace(config, context_parallel_size=1), *args, **kwargs)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attention [S/C, B, ...]; the mask [B, 1, S/C, S] has this rank's rows."""
        assert attention_mask is not None, "a document would see those before it"
        drops = self.attention_dropout.p and self.training
        if self.ranks == 1 and not drops and not query.is_cuda:
            return kernels.attended(query, key, value, attention_mask, self.softmax_scale)
        query, key = query.contiguous(), key.contiguous()
        if self.ranks > 1:
            key, value = _gathered(key), _gathered(value)
        if drops:
            dropped: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
            return dropped
        queries, keys, values = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        output_BASH = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=~attention_mask,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output_BASH.permute(2, 0, 1, 3).flatten(2)


class GatedMLP(MLP):  # type: ignore[misc]
    """A layer's gated products, but for the fused kernels of a GPU."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **keys: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states to hidden states, [S, B, D] both, and no bias."""
        config = self.config
        assert config.activation_func is torch.nn.functional.silu
        if config.bias_activation_fusion or per_token_scale is not None:
            fused: tuple[Tensor, Tensor | None] = super().forward(hidden_states, per_token_scale, **keys)
            return fused
        halves, _ = self.linear_fc1(hidden_states)
        found: tuple[Tensor, Tensor | None] = self.linear_fc2(kernels.swiglu(halves))
        return found


class _Gathered(torch.autograd.Function):
    """Every rank's part [S/C, ...] in the order of the sequence [S, ...]; back: the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        ranks = dist.get_world_size(group)
        ctx.mark = dist.get_rank(group), ranks
        parts = [torch.empty_like(part) for _ in range(ranks)]
        dist.all_gather(parts, part.contiguous(), group=group)
        whole = torch.empty(ranks * len(part), *part.shape[1:], dtype=part.dtype, device=part.device)
        for rank, found in enumerate(parts):
            whole[context_rows(len(whole), rank, ranks)] = found
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rank, ranks = ctx.mark
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
        return gradient[context_rows(len(gradient), rank, ranks)]


def _gathered(part: Tensor) -> Tensor:
    whole: Tensor = _Gathered.apply(part)  # type: ignore[no-untyped-call]
    return whole


def language_blocks(
    config: TransformerConfig, chunk: int | None = None, *, by_documents: bool = False
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage of a language model, or of a chunk of it, and the norm after them.

    Args:
        config: it says whose layers.
        chunk: which of an interleaved stage.
        by_documents: attention is told where documents begin; only Transformer Engine's can be.
    """
    if config.transformer_impl == "transformer_engine":
        from plait.train import engine

        layer, norm = engine.layer_of(config, by_documents=by_documents), engine.NORM
    else:
        layer, norm = _own_layer(config), Norm
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, chunk), layer_norm=norm)


def _own_layer(config: TransformerConfig) -> ModuleSpec:
    """Megatron Core's own."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
    )
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    if not config.num_moe_experts:
        layer.submodules.mlp.module = GatedMLP
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ContextAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return layer
