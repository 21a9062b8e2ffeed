"""Megatron Core's GPT, with packed documents and, on the first stage, SOLO's patch projection.

B = sequences of a micro-batch, S = tokens of a sequence, D = hidden size, H = head size,
N = patches of a micro-batch, P = values of a patch (3 x side x side).
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from torch import Tensor

from plait.models.families.rope import KINDS, PLAIN, Rope


class PackedRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotary angles by each token's own position, which restarts with every document of a pack."""

    position_ids: Tensor | None = None
    inv_freq: Tensor

    def __init__(self, *args: Any, rope: Rope, **kwargs: Any) -> None:
        """Take RotaryEmbedding's arguments, but for its scaling, which is the model's own."""
        super().__init__(*args, **kwargs)
        if rope.kind == "linear":
            self.inv_freq = self.inv_freq / rope.factor
        elif rope.kind == "llama3":
            told = {key: getattr(rope, key) for key in KINDS[rope.kind]}
            self.inv_freq = self._apply_scaling(self.inv_freq, **told)

    def forward(self, max_seq_len: int, *_: Any, **__: Any) -> Tensor:
        """Angles [S, B, 1, H] of the micro-batch whose ``position_ids`` [B, S] were set before."""
        positions_BS = self.position_ids
        assert positions_BS is not None
        assert max_seq_len == positions_BS.shape[1] * parallel_state.get_context_parallel_world_size()
        angles_SBF = positions_BS.t()[..., None].float() * self.inv_freq.to(positions_BS.device)
        return torch.cat((angles_SBF, angles_SBF), dim=-1)[:, :, None, :]


def documents_of(position_ids: Tensor) -> PackedSeqParams:
    """Where the documents of a micro-batch begin, its sequences laid end to end; padding is one of them.

    Args:
        position_ids: [B, S], 0 at the first token of every document, and nowhere else.

    Returns:
        What :class:`plait.train.engine.DocumentAttention` reads; all else sees sequences side by side.
    """
    starts = torch.nonzero(position_ids.flatten() == 0).flatten()
    bounds = torch.cat((starts, starts.new_tensor([position_ids.numel()]))).int()
    longest = position_ids.shape[1]
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class PackedGPTModel(GPTModel):  # type: ignore[misc]
    """One pipeline stage of a language model, or of SOLO where ``patch_dim`` is not 0."""

    def __init__(
        self,
        *args: Any,
        true_vocab_size: int,
        rotary_base: float,
        rope: Rope = PLAIN,
        patch_dim: int = 0,
        **kwargs: Any,
    ) -> None:
        """Take GPTModel's arguments; ``patch_dim`` is P, rows from ``true_vocab_size`` on are padding."""
        super().__init__(*args, position_embedding_type="rope", rotary_base=rotary_base, **kwargs)
        self.true_vocab_size = true_vocab_size
        self.rotary_pos_emb = PackedRotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=1.0,
            rotary_base=rotary_base,
            rope=rope,
            use_cpu_initialization=self.config.use_cpu_initialization,
        )
        if patch_dim and self.pre_process:
            self.vision_patch = ColumnParallelLinear(
                patch_dim,
                self.config.hidden_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=True,
            )

    def _is_in_embd_group(self) -> bool:
        """Whether to sum up the embeddings of first and last stage where they are tied: both are loaded."""
        return False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        pictures: Tensor | None = None,
        picture_rows: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Losses [B, S] on the last stage if there are labels, else its logits, else hidden states.

        Args:
            input_ids: [B, S].
            position_ids: [B, S], from 0 in every document.
            attention_mask: [B, 1, S, S], true where attention is masked out; None if it is told where
                documents begin.
            pictures: patches [N, P], read by the first stage of SOLO.
            picture_rows: [B, S], a row of ``pictures``, or -1 where a token is no patch.
            decoder_input: [S, B, D], embeddings in place of the first stage's own.
            labels: [B, S], the next token.
        """
        self.rotary_pos_emb.position_ids = position_ids
        if self.pre_process and decoder_input is None:
            decoder_input = self.embedding(input_ids, position_ids)
            if pictures is not None:
                assert picture_rows is not None
                decoder_input = decoder_input + self._patch_embedding(pictures, picture_rows)
        if decoder_input is not None and self.config.sequence_parallel:
            decoder_input = scatter_to_sequence_parallel_region(decoder_input)
        output: Tensor = super().forward(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input=decoder_input,
            labels=labels,
            packed_seq_params=documents_of(position_ids) if attention_mask is None else None,
        )
        return output

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses [B, S] over the true vocabulary: padding rows take no part, as they never reach HF."""
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        kept = max(0, self.true_vocab_size - first)
        if kept < logits.shape[-1]:
            logits[..., kept:].fill_(torch.finfo(logits.dtype).min)
        losses: Tensor = super().compute_language_model_loss(labels, logits)
        return losses

    def _patch_embedding(self, patches_NP: Tensor, indices_BS: Tensor) -> Tensor:
        """Projected patches [S, B, D]; a black one stands last, where index -1 finds its projection, zeros.

        So the projection takes part where there is no patch too: copies of the model gather its weights and
        reduce its gradients together, whatever each of them sees.
        """
        black_1P = patches_NP.new_zeros(1, patches_NP.shape[1])
        seen_NP = torch.cat((patches_NP, black_1P)).to(self.vision_patch.weight.dtype)
        rows_ND: Tensor = self.vision_patch(seen_NP)[0]
        return rows_ND[indices_BS.t()]
