"""Qwen2 and Qwen2.5: biases of queries, keys and values; the smaller ones are tied."""

from plait.models.families.family import BIASES, SILU, SLIDES, Family

DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}  # fmt: skip
WINDOWS = frozenset(("sliding_window", "max_window_layers"))
"""They say which layers slide, and none does where ``use_sliding_window`` is false."""
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults=DEFAULTS,
    traits={"attention_bias": True},
    refused=(*BIASES, SILU, *SLIDES),
    inert=WINDOWS,
)
