"""What the config.json of the presets' models says, as the hub has them or a file is unpacked."""

from pathlib import Path

PLANS = Path(__file__).parents[1] / "config/plans"
OWN = {"smollm2-135m"}
"""Plans that are of none of the systems that plait replaces."""
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 1e4, "sliding_window": 4096,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
}  # fmt: skip
LLM_JP = {
    **LLAMA, "vocab_size": 99584, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 40,
}  # fmt: skip
HUB = {
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.3": {
        **MISTRAL, "vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None,
    },
    "meta-llama/Llama-2-7b-hf": LLAMA,
    "llm-jp/llm-jp-3-13b-instruct": LLM_JP,
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
SMOLLM2 = {
    **LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 1e5,
    "tie_word_embeddings": True,
}  # fmt: skip


def config_of(source):
    """The config.json of an entry of ``raw_hf`` that comes from afar."""
    return SMOLLM2 if source.kind == "gguf" else HUB[source.repo]
