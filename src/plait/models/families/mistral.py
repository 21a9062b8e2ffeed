"""Mistral v0.1, whose layers see a window of tokens, and v0.3, without one."""

from plait.models.families.family import ALIKE, BIASES, FIELDS, SILU, WINDOW, Family

DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults=DEFAULTS,
    fields=(*FIELDS, WINDOW),
    refused=(*BIASES, SILU, ALIKE),
)
