"""Operations of a layer in fewer passes over memory than autograd's way through their definitions.

Each is its definition's value, and its gradient is written out: halves of a tensor are filled where they
belong instead of being joined, and little is kept that follows from what is kept. A processor waits for
memory here, not for arithmetic.

S = tokens of a sequence, B = sequences of a micro-batch, A = attention heads, H = head size, F = width of
the activation, D = hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.weak import WeakIdKeyDictionary

from plait.config.run import SCORED_TOKENS

TOKENS = 64
"""How many tokens of documents side by side are worth a call."""


class _Once:
    """What is made of a tensor that every layer is given: by the first of them, and gone with its memory.

    Recomputed layers are given another tensor of the same memory. What is made must have its own.
    """

    def __init__(self, make: Callable[[Tensor, torch.dtype], Sequence[Tensor]]) -> None:
        self.make = make
        self.known = WeakIdKeyDictionary()

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        made: dict[Any, Sequence[Tensor]] = self.known.setdefault(tensor.untyped_storage(), {})
        view = dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor._version  # noqa: SLF001
        if view not in made:
            made[view] = self.make(tensor, dtype)
        return made[view]


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
        torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=of_gate)
        of_gate.mul_(up)
        return found


def swiglu(halves: Tensor) -> Tensor:
    """The SiLU of the first half of the last dimension, times the second: [..., 2F] to [..., F]."""
    found: Tensor = _SwiGLU.apply(halves)  # type: ignore[no-untyped-call]
    return found


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(heads, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, sine, -1), None, None


def _turned(heads_SBAH: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    """Each pair of numbers turned, or back; a head's tokens lie side by side, as attention reads them."""
    S, B, A, H = heads_SBAH.shape
    found_SBAH = heads_SBAH.new_empty(A, B, S, H).permute(2, 1, 0, 3)
    (x, y), (to_x, to_y) = heads_SBAH.chunk(2, dim=-1), found_SBAH.chunk(2, dim=-1)
    torch.mul(x, cosine, out=to_x).addcmul_(y, sine, value=-sign)
    torch.mul(y, cosine, out=to_y).addcmul_(x, sine, value=sign)
    return found_SBAH


@_Once
def _turns(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = angles.chunk(2, dim=-1)[0]
    return half.cos().to(dtype), half.sin().to(dtype)


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
    found: Tensor = _Rotated.apply(heads, *_turns(angles, heads.dtype))  # type: ignore[no-untyped-call]
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
    """Attention inside of documents [S, B, A*H]: few scores between two of them are even computed.

    Args:
        query: [S, B, A, H].
        key, value: the same, of as many heads or fewer.
        masked: where attention is masked out [B, 1, S, S]; no token sees beyond its document, nor does one
            that it does not see the token before it.
        scale: of the scores.
    """
    shared = query.shape[2] // key.shape[2]
    if shared > 1:
        key, value = (one.repeat_interleave(shared, dim=2) for one in (key, value))
    documents = _documents(masked, query.dtype)
    found: Tensor = _Attended.apply(query, key, value, documents, scale)  # type: ignore[no-untyped-call]
    return found


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Sequence[Tensor], scale: float
    ) -> Tensor:
        S, B, A, H = query.shape
        tokens = [one.permute(2, 1, 0, 3).contiguous().flatten(1, 2) for one in (query, key, value)]
        found_ATH, kept = torch.empty_like(tokens[0]), []
        for hidden, to, *parts in zip(documents, *_parts(documents, found_ATH, *tokens), strict=True):
            found, *more = _way(hidden).forward(parts, hidden, scale)
            to.copy_(found)
            kept += more
        ctx.save_for_backward(*tokens, *documents, *kept)
        ctx.known = query.shape, len(documents), scale
        return found_ATH.view(A, B, S, H).permute(2, 1, 0, 3).reshape(S, B, A * H)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (S, B, A, H), count, scale = ctx.known
        saved = iter(ctx.saved_tensors)
        tokens, documents, kept = [*islice(saved, 3)], [*islice(saved, count)], saved
        gradient_ATH = gradient.view(S, B, A, H).permute(2, 1, 0, 3).reshape(A, B * S, H)
        gradients = [torch.empty_like(one) for one in tokens]
        to = zip(*_parts(documents, *gradients), strict=True)
        for hidden, given, *parts in zip(documents, *_parts(documents, gradient_ATH, *tokens), strict=True):
            way = _way(hidden)
            found = way.backward(given, parts, [*islice(kept, way.KEPT)], hidden, scale)
            for one, part in zip(next(to), found, strict=True):
                one.copy_(part)
        return *(one.view(A, B, S, H).permute(2, 1, 0, 3) for one in gradients), None, None


def _parts(documents: Sequence[Tensor], *tokens_ATH: Tensor) -> list[tuple[Tensor, ...]]:
    lengths = [hidden.shape[-1] for hidden in documents]
    return [one.split(lengths, dim=1) for one in tokens_ATH]


def _way(hidden: Tensor) -> "type[_Scored | _Kernel]":
    return _Scored if hidden.shape[-1] <= SCORED_TOKENS else _Kernel


class _Scored:
    """Attention by its definition, all [A, T, H]; the scores of a few tokens stay in the caches."""

    KEPT = 1

    @staticmethod
    def forward(parts: Sequence[Tensor], hidden: Tensor, scale: float) -> Sequence[Tensor]:
        """What is found [A, T, H], and what is kept."""
        query, key, value = parts
        weights_ATT = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=scale).softmax(dim=-1)
        return torch.bmm(weights_ATT, value), weights_ATT

    @staticmethod
    def backward(
        gradient: Tensor, parts: Sequence[Tensor], kept: Sequence[Tensor], _: Tensor, scale: float
    ) -> Sequence[Tensor]:
        """The gradients of queries, keys and values."""
        (query, key, value), (weights_ATT,) = parts, kept
        given = torch.bmm(gradient, value.transpose(1, 2))
        back = torch.ops.aten._softmax_backward_data  # noqa: SLF001 - one pass
        scores = back(given, weights_ATT, -1, given.dtype).mul_(scale)
        weights_ATT, transposed = weights_ATT.transpose(1, 2), scores.transpose(1, 2)
        return torch.bmm(scores, key), torch.bmm(transposed, query), torch.bmm(weights_ATT, gradient)


class _Kernel:
    """The same by torch's kernel, which keeps no scores."""

    KEPT = 2

    @staticmethod
    def forward(parts: Sequence[Tensor], hidden: Tensor, scale: float) -> Sequence[Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
        found, sums = kernel(*(one[None] for one in parts), attn_mask=hidden[None], scale=scale)
        return found[0], found, sums

    @staticmethod
    def backward(
        gradient: Tensor, parts: Sequence[Tensor], kept: Sequence[Tensor], hidden: Tensor, scale: float
    ) -> Sequence[Tensor]:
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
        given = (one[None] for one in (gradient, *parts))
        found = back(*given, *kept, 0.0, False, attn_mask=hidden[None], scale=scale)
        return [part[0] for part in found]


@_Once
def _documents(masked_B1SS: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What is added to scores [1, T, T], for each of the groups: 0, or -inf where attention is masked out."""
    blocks = [masked_B1SS[row, :, begin:end, begin:end] for row, begin, end in _groups(masked_B1SS)]
    return [torch.zeros_like(masked, dtype=dtype).masked_fill_(masked, float("-inf")) for masked in blocks]


def _groups(masked_B1SS: Tensor) -> Iterator[tuple[int, int, int]]:
    """Documents side by side, together as long as a call is worth: sequence, first token, the one after."""
    for row, apart in enumerate(masked_B1SS[:, 0].diagonal(-1, 1, 2)):
        begin = 0
        for start in (apart.nonzero().flatten() + 1).tolist():
            if start - begin >= TOKENS:
                yield row, begin, start
                begin = start
        yield row, begin, len(apart) + 1
