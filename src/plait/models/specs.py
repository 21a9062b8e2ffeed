"""What a Hugging Face ``config.json`` says about a model's shape, checked once.

Parameter shapes follow from the numbers; they are derived here and typed nowhere else. In shapes:
V = vocabulary, D = hidden size, O = query features (heads x head size), K = key features (groups x
head size), F = feed-forward size, P = values of a patch (3 x side x side).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from plait.errors import CheckpointError
from plait.files import read_json

ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM", "SoloForCausalLM")
SOLO = "SoloForCausalLM"
LLAMA = "LlamaForCausalLM"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The shape of a Mistral- or Llama-like model, or of SOLO where ``patch_dim`` is not 0."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None = None
    patch_dim: int = 0
    dtype: str = "float32"

    @classmethod
    def of(cls, folder: Path | str, name: str = "config.json") -> Self:
        """Read the config of a Hugging Face folder, or the copy of it in a Megatron one.

        Raises:
            CheckpointError: the model is of a kind that plait does not know.
            DataError: the file is missing or is not JSON.
        """
        path = Path(folder) / name
        return cls.from_config(read_json(path), where=str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "config.json") -> Self:
        """Read a config; what it leaves out has the default of transformers.

        Raises:
            CheckpointError: a value is missing, or asks for something that plait cannot convert.
        """
        architecture = _architecture(config, where)
        _refuse_the_unknown(config, where)
        heads = _get(config, "num_attention_heads", where)
        hidden = _get(config, "hidden_size", where)
        return cls(
            architecture=architecture,
            vocab_size=_get(config, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=_get(config, "intermediate_size", where),
            num_layers=_get(config, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            rms_norm_eps=_get(config, "rms_norm_eps", where),
            rope_theta=_rope_theta(config, where),
            max_position_embeddings=_get(config, "max_position_embeddings", where),
            sliding_window=config.get("sliding_window", None if architecture == LLAMA else 4096),
            patch_dim=3 * _get(config, "vision_patch_size", where) ** 2 if architecture == SOLO else 0,
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        )

    @property
    def query_size(self) -> int:
        """O: features of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """K: features of all key heads."""
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face parameter name and its shape, in the order of the model."""
        v, d = self.vocab_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
        if self.patch_dim:
            shapes["model.embed_vision_patch.weight"] = (d, self.patch_dim)
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        return shapes | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}

    def _layer(self) -> dict[str, tuple[int, ...]]:
        d, o, k, f = self.hidden_size, self.query_size, self.key_size, self.intermediate_size
        return {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (o, d),
            "self_attn.k_proj.weight": (k, d),
            "self_attn.v_proj.weight": (k, d),
            "self_attn.o_proj.weight": (d, o),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f),
        }


def _get(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"{where} has no {key}")
    return config[key]


def _architecture(config: Mapping[str, Any], where: str) -> str:
    found = config.get("architectures") or ["none"]
    if len(found) != 1 or found[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{where} is of architecture {', '.join(map(str, found))}",
            hint=f"plait converts {', '.join(ARCHITECTURES)}",
        )
    return str(found[0])


def _refuse_the_unknown(config: Mapping[str, Any], where: str) -> None:
    """Refuse what would change the numbers and has no row in the tables."""
    if config.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{where} ties the output layer to the embedding; plait trains untied models only",
            hint="save it untied: the embedding again as lm_head.weight, and tie_word_embeddings false",
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(f"{where} has {key}; plait converts models without biases")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{where} has hidden_act {activation!r}; plait converts silu models")
    heads, groups = config.get("num_attention_heads") or 1, config.get("num_key_value_heads") or 1
    if heads % groups:
        raise CheckpointError(f"{where}: {heads} attention heads do not divide into {groups} key-value heads")


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """The rotary base: transformers 5 writes ``rope_parameters``, 4 writes ``rope_theta``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{where} scales its rotary embedding ({kind!r}), which plait cannot convert yet"
        )
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
