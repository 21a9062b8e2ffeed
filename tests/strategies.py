"""Hypothesis strategies: specs, the grids that hold them, and tiny checkpoints."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from plait.models.families.rope import Rope
from plait.models.specs import Spec
from plait.parallel.grid import Grid

ARCHITECTURES = {
    "patch_dim": "SoloForCausalLM",
    "num_experts": "MixtralForCausalLM",
    "attention_bias": "Qwen2ForCausalLM",
    "qk_norm": "Qwen3ForCausalLM",
    "rope": "LlamaForCausalLM",
}

SCALED = Rope(kind="llama3", factor=8.0, original_max_position_embeddings=16)
STRETCHED = Rope(kind="linear", factor=2.5)


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint and a grid that can hold it."""

    spec: Spec
    grid: Grid
    hf: dict[str, torch.Tensor]


def spec_of(**changes):
    """A tiny Mistral; SOLO where ``patch_dim`` is given, Mixtral where ``num_experts`` is, and so on."""
    named = [name for key, name in ARCHITECTURES.items() if changes.get(key)]
    values = {
        "architecture": named[0] if named else "MistralForCausalLM",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
    }
    values |= changes
    return Spec(text_architecture=values["architecture"], **values)


@st.composite
def specs(draw):
    """MHA, GQA and MQA models of every family, whose numbers are small and mostly unlike each other."""
    groups = draw(st.sampled_from((1, 2, 4)))
    kind = draw(
        st.sampled_from(
            (
                {},
                {"patch_dim": 12},
                {"patch_dim": 27},
                {"num_experts": 3, "experts_per_token": 2},
                {"attention_bias": True},
                {"qk_norm": True},
                {"rope": SCALED},
                {"rope": STRETCHED},
            )
        )
    )
    return spec_of(
        vocab_size=draw(st.integers(5, 600)),
        hidden_size=draw(st.sampled_from((8, 12, 16))),
        intermediate_size=4 * draw(st.integers(1, 5)),
        num_layers=draw(st.sampled_from((1, 2, 4, 6))),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from((2, 4, 6))),
        tied=draw(st.booleans()),
        **kind,
    )


def grids(spec):
    """Grids that divide a spec's groups and layers."""
    divisors = [
        [n for n in range(1, size + 1) if size % n == 0]
        for size in (spec.num_key_value_heads, spec.num_layers)
    ]
    return st.builds(Grid, tp=st.sampled_from(divisors[0]), pp=st.sampled_from(divisors[1]))


def weights(spec, seed=0, dtype=torch.float32):
    """Random weights of every parameter, all elements different from each other and from 0."""
    draw = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(draw.standard_normal(shape)).to(dtype) for name, shape in spec.shapes.items()
    }


@st.composite
def tiny_checkpoints(draw):
    """A spec, its weights, and a grid."""
    spec = draw(specs())
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    return Case(spec, draw(grids(spec)), weights(spec, draw(st.integers(0, 99)), dtype))
