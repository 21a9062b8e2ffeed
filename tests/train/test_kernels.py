"""The CPU's layers beside the definitions that they stand for: values, and gradients by autograd."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from torch.nn.functional import scaled_dot_product_attention, silu

from plait.train import kernels
from plait.train.batches import masked_out

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def compared(ours, definition, *inputs):
    """Both give the same from the same, forward and back."""
    inputs = [one.requires_grad_() for one in inputs]
    found, expected = ours(*inputs), definition(*inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    gradient = torch.randn(expected.shape)
    for one, other in zip(
        *(torch.autograd.grad(y, inputs, gradient) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_swiglu():
    def definition(halves):
        gate, up = halves.chunk(2, dim=-1)
        return silu(gate) * up

    compared(kernels.swiglu, definition, torch.randn(5, 2, 14))


def test_heads_are_turned_by_their_angles():
    angles = torch.rand(7, 2, 1, 4).repeat(1, 1, 1, 2) * 9

    def definition(heads):
        return heads * angles.cos() + _rotate_half(heads, rotary_interleaved=False) * angles.sin()

    compared(lambda heads: kernels.rotated(heads, angles), definition, torch.randn(7, 2, 3, 24)[..., :8])


def test_a_row_is_normed():
    def definition(hidden, weight):
        return torch.nn.functional.rms_norm(hidden, (12,), weight, 1e-3)

    norm = kernels.RMSNorm(12, eps=1e-3)
    norm.weight.data.uniform_()
    compared(norm, lambda hidden: definition(hidden, norm.weight), torch.randn(4, 3, 12))

    def ours(hidden, weight):
        return kernels._Normed.apply(hidden, weight, 1e-3)

    compared(ours, definition, torch.randn(4, 3, 12), torch.rand(12))


def test_a_norm_in_bf16_is_computed_in_fp32():
    hidden, weight = torch.randn(64, 2, 48), torch.rand(48)
    norm = kernels.RMSNorm(48, eps=1e-6, dtype=torch.bfloat16)
    norm.weight.data.copy_(weight)
    found = norm(hidden.bfloat16())
    expected = torch.nn.functional.rms_norm(
        hidden.bfloat16().float(), (48,), norm.weight.float(), 1e-6
    ).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_a_norm_in_fp64_stays_so():
    hidden, weight = torch.randn(5, 12).double().requires_grad_(), torch.rand(12).double().requires_grad_()
    found = kernels._Normed.apply(hidden, weight, 1e-6)
    expected = torch.nn.functional.rms_norm(hidden, (12,), weight, 1e-6)
    gradients = [torch.autograd.grad(one.square().sum(), [hidden, weight]) for one in (found, expected)]
    for one, other in [(found, expected), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


DOCUMENTS = {
    "of three documents and of one": [[5, 9, 10], [24]],
    "of one token each": [[1] * 24, [24]],
    "a long one after short ones": [[1, 2, 21], [12, 12]],
}


@pytest.mark.parametrize("scored", [0, 8, 100])
@pytest.mark.parametrize("tokens", [1, 6, 100])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_attention_by_documents_is_that_under_the_whole_mask(
    lengths, key_heads, window, tokens, scored, monkeypatch
):
    monkeypatch.setattr(kernels, "TOKENS", tokens)
    monkeypatch.setattr(kernels, "SCORED_TOKENS", scored)
    documents = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    masked = masked_out(torch.stack(documents), window)

    def ours(query, key, value):
        return kernels.attended(query, key, value, masked, 0.3)

    def definition(*parts):
        queries, keys, values = (one.permute(1, 2, 0, 3) for one in parts)
        found = scaled_dot_product_attention(
            queries, keys, values, attn_mask=~masked, scale=0.3, enable_gqa=True
        )
        return found.permute(2, 0, 1, 3).flatten(2)

    shapes = (24, 2, 4, 8), (24, 2, key_heads, 8), (24, 2, key_heads, 8)
    compared(ours, definition, *(torch.randn(shape) for shape in shapes))


def test_documents_are_attended_together_while_they_are_short(monkeypatch):
    monkeypatch.setattr(kernels, "TOKENS", 6)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 3, 3, 3], [0] * 10])
    assert [*kernels._groups(masked_out(documents))] == [(0, 0, 6), (0, 6, 10), (1, 0, 10)]


def test_what_layers_share_is_made_once_and_gone_with_the_memory_of_what_it_is_made_of():
    masked = masked_out(torch.tensor([[0, 0, 1, 1]]))
    first = kernels._documents(masked, torch.float32)
    assert kernels._documents(masked, torch.float32) is first
    assert kernels._documents(masked.detach(), torch.float32) is first
    assert kernels._documents(masked, torch.bfloat16)[0].dtype == torch.bfloat16
    assert kernels._documents(masked_out(torch.tensor([[0, 0, 0, 1]])), torch.float32) is not first
    masked[..., 3, 2] = True
    assert kernels._documents(masked, torch.float32)[-1].isinf().sum() > first[-1].isinf().sum()
    assert len(kernels._documents.known) == 1
    del masked
    assert not len(kernels._documents.known)
