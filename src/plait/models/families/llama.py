"""Llama 2 and 3, and what has their shape: TinyLlama, SmolLM2, LLM-jp."""

from plait.models.families.family import Family

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    },
)  # fmt: skip
