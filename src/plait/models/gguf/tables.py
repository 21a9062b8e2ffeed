"""Keys and tensor names of llama.cpp's ``llama`` files, and what they are in a Hugging Face folder.

A key is read by a row here, is known to say nothing of what is computed, or is refused by its name
if it is set.
"""

import re
from collections.abc import Mapping
from typing import Any

from plait.errors import CheckpointError
from plait.models.gguf.header import Header, broken
from plait.models.specs import EMBEDDING, HEAD, LLAMA

ARCHITECTURE, QUANTIZATION = "general.architecture", "general.quantization_version"
# fmt: off
KEYS = {
    "llama.vocab_size":                       "vocab_size",
    "llama.context_length":                   "max_position_embeddings",
    "llama.embedding_length":                 "hidden_size",
    "llama.block_count":                      "num_hidden_layers",
    "llama.feed_forward_length":              "intermediate_size",
    "llama.attention.head_count":             "num_attention_heads",
    "llama.attention.head_count_kv":          "num_key_value_heads",
    "llama.attention.key_length":             "head_dim",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base":                   "rope_theta",
    "tokenizer.ggml.bos_token_id":            "bos_token_id",
    "tokenizer.ggml.eos_token_id":            "eos_token_id",
    "tokenizer.ggml.padding_token_id":        "pad_token_id",
}
"""The field of config.json that says the same."""
HEADS = ("llama.attention.value_length", "llama.rope.dimension_count")
"""What must be the size of a head: plait's queries, keys and values have one, and are rotated whole."""
OF_TOKENIZER = {
    f"tokenizer.{key}" for key in (
        "ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "ggml.unknown_token_id",
        "chat_template",
    )
}
"""Read by :mod:`plait.models.gguf.tokenizer`."""
INERT = re.compile(r"general\.(?!architecture$)[\w.]+|quantize\.[\w.]+|tokenizer\.ggml\.scores")
"""Names, licences, how the file was packed; scores of tokens, where merges decide."""
TENSORS = {
    "token_embd":  EMBEDDING.removesuffix(".weight"),
    "output_norm": "model.norm",
    "output":      HEAD.removesuffix(".weight"),
    "attn_norm":   "input_layernorm",
    "attn_q":      "self_attn.q_proj",
    "attn_k":      "self_attn.k_proj",
    "attn_v":      "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm":    "post_attention_layernorm",
    "ffn_gate":    "mlp.gate_proj",
    "ffn_up":      "mlp.up_proj",
    "ffn_down":    "mlp.down_proj",
}
# fmt: on
NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.weight")
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Weights whose rows llama.cpp has in another order, and the field that says how many heads they have."""


def config_of(header: Header, dtype: str) -> dict[str, Any]:
    """The config.json of a file, its weights being written as ``dtype`` (torch's name).

    Raises:
        CheckpointError: it is of another architecture, or has a key that plait does not know.
    """
    _refuse(header)
    values = header.values
    found = {name: values[key] for key, name in KEYS.items() if key in values}
    tokens = values.get("tokenizer.ggml.tokens")
    found.setdefault("vocab_size", len(tokens) if isinstance(tokens, list) else 0)
    heads = found.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or not isinstance(found.get("hidden_size"), int):
        raise broken(header.path, f"it says {heads!r} heads of a model {found.get('hidden_size')!r} wide")
    found.setdefault("num_key_value_heads", heads)
    found.setdefault("head_dim", found["hidden_size"] // heads)
    for key in HEADS:
        if values.get(key, found["head_dim"]) != found["head_dim"]:
            raise CheckpointError(
                f"{header.path}: {key} is {values[key]!r}, and a head has {found['head_dim']} features",
                hint="plait converts models whose heads are of one size and rotated whole",
            )
    return {
        **found,
        "architectures": [LLAMA],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "use_cache": True,
        "dtype": dtype,
    }


def _refuse(header: Header) -> None:
    """Refuse what is no model of the table, or says what nobody here reads."""
    kind = header.values.get(ARCHITECTURE)
    if kind != "llama":
        raise CheckpointError(
            f"{header.path} is of architecture {kind!r}",
            hint="plait reads GGUF files of architecture 'llama': Llama, SmolLM2 and their like",
        )
    if header.values.get(QUANTIZATION, 2) != 2:
        raise CheckpointError(
            f"{header.path} is packed by version {header.values[QUANTIZATION]!r} of ggml's blocks",
            hint="plait unpacks version 2: pack the model anew",
        )
    known = {ARCHITECTURE, *KEYS, *HEADS, *OF_TOKENIZER}
    odd = sorted(k for k, v in header.values.items() if v and k not in known and not INERT.fullmatch(k))
    if odd:
        raise CheckpointError(
            f"{header.path} has {' and '.join(odd[:3])}, which plait does not know: the model may compute or "
            "write otherwise",
            hint="take a model of Hugging Face's own format",
        )


def names_of(header: Header) -> dict[str, str]:
    """The file's name of each Hugging Face tensor; what no row knows keeps its own.

    Whether these are all, each with its shape, follows from the config: see ``check_shapes``.
    """
    return {_name(name): name for name in header.tensors}


def _name(name: str) -> str:
    found = NAME.fullmatch(name)
    if found is None or found["part"] not in TENSORS:
        return name
    layer = "" if found["layer"] is None else f"model.layers.{found['layer']}."
    return f"{layer}{TENSORS[found['part']]}.weight"


def heads_of(name: str, config: Mapping[str, Any]) -> int:
    """How many heads' rows of a tensor are in llama.cpp's order; 0 if they are in Hugging Face's."""
    found = NAME.fullmatch(name)
    key = ROTATED.get(found["part"]) if found else None
    return int(config[key]) if key else 0
