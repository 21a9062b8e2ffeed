"""Operations of a layer in fewer passes over memory than autograd's way through their definitions.

Each is its definition's value, and its gradient is written out: halves of a tensor are filled where they
belong instead of being joined, and what follows from a saved tensor is not saved too. A processor waits for
memory here, not for arithmetic.

S = tokens of a sequence, B = sequences of a micro-batch, A = attention heads, H = head size, F = width of
the activation, D = hidden size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from plait.config.run import SCORED_TOKENS

TOKENS = 128
"""How many tokens of documents side by side are worth a call."""


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        gate, up = halves.chunk(2, dim=-1)
        opened = silu(gate)
        ctx.save_for_backward(halves, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        halves, opened = ctx.saved_tensors
        gate, up = halves.chunk(2, dim=-1)
        found = torch.empty_like(halves)
        of_gate, of_up = found.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return found


def swiglu(halves: Tensor) -> Tensor:
    """The SiLU of the first half of the last dimension, times the second: [..., 2F] to [..., F]."""
    found: Tensor = _SwiGLU.apply(halves)  # type: ignore[no-untyped-call]
    return found


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(heads, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, -sine), None, None


def _turned(heads_SBAH: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each pair of numbers turned; a head's tokens lie side by side, as attention reads them."""
    S, B, A, H = heads_SBAH.shape
    found_SBAH = heads_SBAH.new_empty(A, B, S, H).permute(2, 1, 0, 3)
    (x, y), (to_x, to_y) = heads_SBAH.chunk(2, dim=-1), found_SBAH.chunk(2, dim=-1)
    torch.mul(x, cosine, out=to_x).addcmul_(y, sine, value=-1)
    torch.mul(y, cosine, out=to_y).addcmul_(x, sine)
    return found_SBAH


def rotated(
    heads: Tensor,
    angles: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """Heads [S, B, A, H] turned by angles [S, B or 1, 1, H], whose halves are alike.

    It takes the arguments of Megatron's ``_apply_rotary_pos_emb_bshd``; of those that no model of ours asks
    for only what they are by default.
    """
    assert not rotary_interleaved
    assert not multi_latent_attention
    assert mscale == 1.0
    assert angles.shape[-1] == heads.shape[-1]
    half = angles.chunk(2, dim=-1)[0]
    cosine, sine = half.cos().to(heads.dtype), half.sin().to(heads.dtype)
    found: Tensor = _Rotated.apply(heads, cosine, sine)  # type: ignore[no-untyped-call]
    return found


def _wide(numbers: Tensor) -> Tensor:
    """Numbers as sums of them are computed: in fp32, or as they are where that is more."""
    return numbers if numbers.dtype == torch.float64 else numbers.float()


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        numbers = _wide(hidden)
        length = torch.linalg.vector_norm(numbers, dim=-1, keepdim=True)
        scale = (length.square_() / hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        found: Tensor = (numbers * scale).mul_(_wide(weight)).to(hidden.dtype)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        gradient, heavy = _wide(gradient), _wide(weight)
        normed = _wide(hidden) * scale
        products = gradient * normed
        of_weight = products.flatten(0, -2).sum(dim=0)
        shared = (products @ heavy)[..., None] / hidden.shape[-1]
        found = (gradient * heavy).addcmul_(normed, shared, value=-1).mul_(scale)
        return found.to(hidden.dtype), of_weight.to(weight.dtype), None


class RMSNorm(torch.nn.RMSNorm):
    """Torch's, [..., D]; a GPU has a kernel of its own for it."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Each row over the root of its mean square, times the weights; computed in fp32 at least."""
        if hidden.is_cuda:
            torchs: Tensor = super().forward(hidden)
            return torchs
        found: Tensor = _Normed.apply(hidden, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return found


def attended(query: Tensor, key: Tensor, value: Tensor, masked: Tensor, scale: float) -> Tensor:
    """Attention inside of documents [S, B, A*H]: scores between two of them are not even computed.

    Args:
        query: [S, B, A, H].
        key, value: the same, of as many heads or fewer.
        masked: where attention is masked out [B, 1, S, S]; no token sees beyond its document, nor does one
            that it does not see the token before it.
        scale: of the scores.
    """
    groups = [*_groups(masked)]
    lengths, shared = [end - begin for _, begin, end in groups], query.shape[2] // key.shape[2]
    if shared > 1:
        key, value = (one.repeat_interleave(shared, dim=2) for one in (key, value))
    tokens = (one.permute(2, 1, 0, 3).contiguous().flatten(1, 2) for one in (query, key, value))
    parts = zip(groups, *(one.split(lengths, dim=1) for one in tokens), strict=True)
    found = []
    for (row, begin, end), queries, keys, values in parts:
        attend = _scored if end - begin <= SCORED_TOKENS else _kernel
        found.append(attend(queries, keys, values, masked[row, :, begin:end, begin:end], scale))
    found_TAH = torch.cat([one_ATH.transpose(0, 1) for one_ATH in found])
    return found_TAH.view(*query.shape[1::-1], -1).transpose(0, 1).contiguous()


def _scored(query: Tensor, key: Tensor, value: Tensor, masked: Tensor, scale: float) -> Tensor:
    """Attention by its definition, all [A, T, H]; the scores of a few tokens stay in the caches."""
    hidden = torch.zeros_like(masked, dtype=query.dtype).masked_fill_(masked, float("-inf"))
    scores_ATT = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=scale)
    return scores_ATT.softmax(dim=-1) @ value


def _kernel(query: Tensor, key: Tensor, value: Tensor, masked: Tensor, scale: float) -> Tensor:
    """The same by torch's kernel, which keeps no scores."""
    return scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=~masked[None], scale=scale
    )[0]


def _groups(masked_B1SS: Tensor) -> Iterator[tuple[int, int, int]]:
    """Documents side by side, together as long as a call is worth: sequence, first token, the one after."""
    for row, apart in enumerate(masked_B1SS[:, 0].diagonal(-1, 1, 2)):
        begin = 0
        for start in (apart.nonzero().flatten() + 1).tolist():
            if start - begin >= TOKENS:
                yield row, begin, start
                begin = start
        yield row, begin, len(apart) + 1
