"""A stand-in for Transformer Engine on a CPU, and what plait's models are when Megatron Core finds it.

Transformer Engine does not install here. This has the few of its classes that Megatron Core builds layers
from, with the arguments, parameter names and shapes that its documentation gives, computed by plain torch.
So Megatron Core's own wrappers run, and with them all that plait does around them: which layers, names,
masks and documents. It says nothing of Transformer Engine's kernels. ``python engine_stand_in.py CASE``
prints what a test asks for, as JSON; it is a process of its own, as Megatron Core looks once.
"""

import json
import sys
import types

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

VERSION = "2.9.0"


class Remembering(torch.nn.Module):
    """A module with an extra state, as all of Transformer Engine's have."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is not None and state.numel():
            raise RuntimeError("nothing is remembered here")


def weight(rows, columns=None, **kwargs):
    sizes = (rows,) if columns is None else (rows, columns)
    return torch.nn.Parameter(torch.empty(*sizes, dtype=kwargs["params_dtype"], device=kwargs["device"]))


class Linear(Remembering):
    def __init__(self, in_features, out_features, *, parallel_mode, tp_size, bias, **kwargs):
        super().__init__()
        assert (tp_size, bias) == (1, False)
        self.parallel_mode, self.tp_size, self.tp_rank = parallel_mode, tp_size, 0
        self.weight = weight(out_features, in_features, **kwargs)

    def forward(self, found, is_first_microbatch=None):
        return F.linear(found, self.weight)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps, normalization, **kwargs):
        super().__init__(in_features, out_features, **kwargs)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = weight(in_features, **kwargs)

    def forward(self, found, is_first_microbatch=None):
        normed = F.rms_norm(found, found.shape[-1:], self.layer_norm_weight, self.eps)
        return F.linear(normed, self.weight)


class RMSNorm(Remembering):
    def __init__(self, hidden_size, eps, **kwargs):
        super().__init__()
        self.weight, self.eps = weight(hidden_size, **kwargs), eps

    def forward(self, found):
        return F.rms_norm(found, found.shape[-1:], self.weight, self.eps)


class GroupedLinear(Remembering):
    fp8 = fp8_calibration = use_bias = False

    def __init__(self, num_gemms, in_features, out_features, **kwargs):
        super().__init__()
        self.num_gemms, self.fp8_meta = num_gemms, {"fp8_checkpoint": False}
        for number in range(num_gemms):
            setattr(self, f"weight{number}", weight(out_features, in_features, **kwargs))

    def init_fp8_metadata(self, num_gemms):
        """There is none."""

    def forward(self, found, m_splits, is_first_microbatch=None):
        parts = found.split(m_splits)
        return torch.cat([F.linear(p, getattr(self, f"weight{n}")) for n, p in enumerate(parts)])


class DotProductAttention(Remembering):
    """``thd`` with ``padding_causal``: within documents; ``sbhd`` with ``arbitrary``: by a mask.

    With any other kind a mask would be ignored, as flash attention does: here that is an error.
    """

    def __init__(self, attn_mask_type, window_size=None, **kwargs):
        super().__init__()
        self.window = window_size
        self.register_load_state_dict_post_hook(self._without)

    @staticmethod
    def _without(module, incompatible):
        for key in [one for one in incompatible.missing_keys if "core_attention._extra_state" in one]:
            incompatible.missing_keys.remove(key)

    def forward(self, query, key, value, mask, *, attn_mask_type, qkv_format="sbhd", **packed):
        if (qkv_format, attn_mask_type) == ("thd", "padding_causal"):
            assert mask is None
            return self._documents(query, key, value, packed["cu_seqlens_q"], packed["max_seqlen_q"])
        assert (qkv_format, attn_mask_type, packed) == ("sbhd", "arbitrary", {})
        assert (mask.dtype, self.window) == (torch.bool, None)
        return attention(*(part.permute(1, 2, 0, 3) for part in (query, key, value)), mask).flatten(2)

    def _documents(self, query, key, value, bounds, longest):
        assert (bounds.dtype, int(bounds[0]), int(bounds[-1])) == (torch.int32, 0, len(query))
        done = []
        for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            assert first < end <= first + longest
            seen = torch.ones(end - first, end - first, dtype=torch.bool).tril()
            if self.window is not None:
                seen = seen.triu(-self.window[0])
            parts = (part[first:end].transpose(0, 1)[None] for part in (query, key, value))
            done.append(attention(*parts, ~seen)[:, 0])
        return torch.cat(done).flatten(1)


def attention(query, key, value, mask):
    """[S, B, H, D] of [B, H, S, D]; keys are repeated for their queries."""
    times = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    found = scores.masked_fill(mask, float("-inf")).float().softmax(-1).to(value.dtype) @ value
    return found.permute(2, 0, 1, 3)


CLASSES = {
    "pytorch": (Linear, LayerNormLinear, RMSNorm, GroupedLinear, DotProductAttention),
    "pytorch.fp8": ("FP8GlobalStateManager", "fp8_autocast"),
    "pytorch.distributed": ("CudaRNGStatesTracker", "activation_recompute_forward", "checkpoint"),
    "pytorch.ops": ("FusibleOperation", "Sequential"),
    "pytorch.router": (
        "fused_compute_score_for_moe_aux_loss",
        "fused_moe_aux_loss",
        "fused_topk_with_score_function",
    ),
    "pytorch.cpu_offload": (),
    "pytorch.tensor": ("QuantizedTensor",),
    "common": (),
    "common.recipe": ("DelayedScaling",),
}
"""What Megatron Core looks for when it is imported; only the classes of the first are ever used."""


def install():
    """Put it where Megatron Core looks, before that is imported."""
    root = types.ModuleType("transformer_engine")
    root.__version__, root.__path__ = VERSION, []
    sys.modules["transformer_engine"] = root
    for name, classes in CLASSES.items():
        module = types.ModuleType(f"transformer_engine.{name}")
        module.__path__ = []
        for one in classes:
            made = type(one, (), {}) if isinstance(one, str) else one
            setattr(module, made.__name__, made)
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        setattr(sys.modules[parent], last, module)


def main(case):
    install()
    import engine_cases

    json.dump(getattr(engine_cases, case)(), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
