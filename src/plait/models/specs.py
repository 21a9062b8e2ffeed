"""What a Hugging Face ``config.json`` says about a model's shape, checked once.

Parameter shapes follow from the numbers; they are derived here and typed nowhere else. In shapes:
V = vocabulary, D = hidden size, O = query features (heads x head size), K = key features (groups x
head size), F = feed-forward size, E = experts, P = values of a patch (3 x side x side).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from plait.errors import CheckpointError
from plait.files import read_object
from plait.models.towers import Projector, Tower, check_size, part

SOLO = "SoloForCausalLM"
LLAMA = "LlamaForCausalLM"
QWEN2 = "Qwen2ForCausalLM"
MIXTRAL = "MixtralForCausalLM"
LLAVA = "LlavaForConditionalGeneration"
ARCHITECTURES = ("MistralForCausalLM", LLAMA, QWEN2, MIXTRAL, SOLO, LLAVA)
TEXT_ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": LLAMA, "qwen2": QWEN2}
"""The language models of LLaVA, by the ``model_type`` of its ``text_config``."""
LANGUAGE_MODEL, TOWER, PROJECTOR = "language_model.", "vision_tower.vision_model.", "multi_modal_projector."
"""Where the parts of a LLaVA model stand in its folder."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The shape of a Mistral-, Llama-, Qwen2- or Mixtral-like model.

    It is SOLO's where ``patch_dim`` is not 0, the language model's of LLaVA where there is a tower, and a
    mixture of experts where ``num_experts`` is not 0.
    """

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
    attention_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    patch_dim: int = 0
    dtype: str = "float32"
    text_architecture: str = ""
    vision: Tower | None = None
    projector: Projector | None = None
    image_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, folder: Path | str, name: str = "config.json") -> Self:
        """Read the config of a Hugging Face folder, or the copy of it in a Megatron one.

        Raises:
            CheckpointError: the model is of a kind that plait does not know.
            DataError: the file is missing or is not a JSON object.
        """
        path = Path(folder) / name
        return cls.from_config(read_object(path), where=str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "config.json") -> Self:
        """Read a config; what it leaves out has the default of transformers.

        Raises:
            CheckpointError: a value is missing, or asks for something that plait cannot convert.
        """
        architecture = _architecture(config, where)
        text = _text_config(config, where) if architecture == LLAVA else config
        kind = str(text["architectures"][0])
        _refuse_the_unknown(text, where, kind)
        heads = _size(text, "num_attention_heads", where)
        hidden = _size(text, "hidden_size", where)
        return cls(
            architecture=architecture,
            text_architecture=kind,
            vocab_size=_size(text, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=_size(text, "intermediate_size", where),
            num_layers=_size(text, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=_size(text, "num_key_value_heads", where, default=heads),
            head_dim=_size(text, "head_dim", where, default=hidden // heads),
            rms_norm_eps=_number(_get(text, "rms_norm_eps", where), "rms_norm_eps", where),
            rope_theta=_rope_theta(text, where),
            max_position_embeddings=_size(text, "max_position_embeddings", where),
            sliding_window=_sliding_window(text, kind),
            attention_bias=kind == QWEN2,
            **(_experts(text, where) if kind == MIXTRAL else {}),
            patch_dim=3 * _size(config, "vision_patch_size", where) ** 2 if architecture == SOLO else 0,
            dtype=next(
                (c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if c.get(k)), "float32"
            ),
            **(_pictures(config, hidden, where) if architecture == LLAVA else {}),
        )

    @property
    def lm(self) -> "Spec":
        """The language model alone."""
        if self.vision is None:
            return self
        return replace(
            self,
            architecture=self.text_architecture,
            vision=None,
            projector=None,
            image_token_id=None,
            pad_token_id=None,
        )

    @property
    def norm(self) -> str:
        """The language model's last norm: a tensor that every model has."""
        return (LANGUAGE_MODEL if self.vision else "") + "model.norm.weight"

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
        if self.vision is None or self.projector is None:
            return self._language_shapes()
        parts = (
            (TOWER, self.vision.shapes),
            (PROJECTOR, self.projector.shapes),
            (LANGUAGE_MODEL, self._language_shapes()),
        )
        return {prefix + name: shape for prefix, shapes in parts for name, shape in shapes.items()}

    def _language_shapes(self) -> dict[str, tuple[int, ...]]:
        v, d = self.vocab_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
        if self.patch_dim:
            shapes["model.embed_vision_patch.weight"] = (d, self.patch_dim)
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        return shapes | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}

    def _layer(self) -> dict[str, tuple[int, ...]]:
        d, o, k = self.hidden_size, self.query_size, self.key_size
        biases = {"q_proj": o, "k_proj": k, "v_proj": k} if self.attention_bias else {}
        return {
            **{f"self_attn.{name}.bias": (size,) for name, size in biases.items()},
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (o, d),
            "self_attn.k_proj.weight": (k, d),
            "self_attn.v_proj.weight": (k, d),
            "self_attn.o_proj.weight": (d, o),
            "post_attention_layernorm.weight": (d,),
            **(self._feed_forward() if not self.num_experts else self._experts()),
        }

    def _feed_forward(self) -> dict[str, tuple[int, ...]]:
        d, f = self.hidden_size, self.intermediate_size
        return {f"mlp.{name}_proj.weight": shape for name, shape in _gated("gate", "up", "down", d, f)}

    def _experts(self) -> dict[str, tuple[int, ...]]:
        d, f = self.hidden_size, self.intermediate_size
        return {
            "block_sparse_moe.gate.weight": (self.num_experts, d),
            **{
                f"block_sparse_moe.experts.{expert}.{name}.weight": shape
                for expert in range(self.num_experts)
                for name, shape in _gated("w1", "w3", "w2", d, f)
            },
        }


def _gated(gate: str, up: str, down: str, d: int, f: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The three weights of a gated feed-forward network (Mixtral's order on the hub: w1, w2, w3)."""
    return (gate, (f, d)), (up, (f, d)), (down, (d, f))


def _get(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"{where} has no {key}")
    return config[key]


def _size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number above zero, which may be left out only where there is a default."""
    value = config.get(key)
    return check_size(_get(config, key, where) if default is None else value or default, key, where)


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def _architecture(config: Mapping[str, Any], where: str) -> str:
    found = config.get("architectures") or ["none"]
    if not isinstance(found, list) or len(found) != 1 or found[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{where} is of architecture {', '.join(map(str, found)) if isinstance(found, list) else found}",
            hint=f"plait converts {', '.join(ARCHITECTURES)}",
        )
    return str(found[0])


def _text_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The language model's part of a LLaVA config, with its architecture named."""
    text = part(config, "text_config", where)
    kind = TEXT_ARCHITECTURES.get(str(text.get("model_type", "llama")))
    if kind is None:
        raise CheckpointError(
            f"{where} has a language model of type {text.get('model_type')!r}",
            hint=f"plait converts {', '.join(TEXT_ARCHITECTURES)}",
        )
    tied = {"tie_word_embeddings": True} if config.get("tie_word_embeddings") else {}
    return {**TEXT_DEFAULTS[kind], **text, **tied, "architectures": [kind]}


_COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    LLAMA: {
        **_COMMON, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048,
    },
    "MistralForCausalLM": {
        **_COMMON, "vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    QWEN2: {
        **_COMMON, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
}  # fmt: skip
"""What a ``text_config`` leaves out has the default of transformers."""


def _pictures(config: Mapping[str, Any], hidden_size: int, where: str) -> dict[str, Any]:
    """Tower, projector and the picture's token of a LLaVA config."""
    vision = part(config, "vision_config", where)
    if not vision:
        raise CheckpointError(f"{where} has no vision_config")
    vision = {"model_type": "clip_vision_model", **vision}
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{where} has projector_hidden_act {config['projector_hidden_act']!r}, not gelu"
        )
    tower = Tower.from_config(
        vision,
        where=where,
        feature_layer=config.get("vision_feature_layer", -2),
        drop_class_token=config.get("vision_feature_select_strategy", "default") == "default",
    )
    projector = Projector(
        input_size=tower.hidden_size,
        hidden_size=_size(config, "projector_hidden_size", where, default=hidden_size),
        output_size=hidden_size,
        bias=config.get("multimodal_projector_bias", True),
    )
    token = config.get("image_token_id", config.get("image_token_index", 32000))
    pad = config.get("pad_token_id", config["text_config"].get("pad_token_id"))
    return {
        "vision": tower,
        "projector": projector,
        "image_token_id": token,
        "pad_token_id": None if pad is None or pad < 0 else pad,
    }


def _sliding_window(config: Mapping[str, Any], architecture: str) -> int | None:
    """The window in tokens, with the defaults of transformers; Qwen2 with one is refused."""
    if architecture == QWEN2:
        return None
    window: int | None = config.get("sliding_window", None if architecture in (LLAMA, MIXTRAL) else 4096)
    return window


def _experts(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How many experts a Mixtral has, and how many of them a token sees."""
    experts = _size(config, "num_local_experts", where, default=8)
    chosen = _size(config, "num_experts_per_tok", where, default=2)
    if not 2 <= chosen <= experts:
        raise CheckpointError(
            f"{where} sends a token to {chosen} of {experts} experts; Megatron's router weighs 2 or more",
            hint="num_experts_per_tok is from 2 to num_local_experts",
        )
    if config.get("router_jitter_noise"):
        raise CheckpointError(f"{where} has router_jitter_noise, which plait does not train with")
    return {"num_experts": experts, "experts_per_token": chosen}


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether some layers of a Qwen2 attend within a window, which plait has for all layers or for none."""
    return bool(config.get("use_sliding_window")) or "sliding_attention" in (config.get("layer_types") or ())


def _refuse_the_unknown(config: Mapping[str, Any], where: str, architecture: str) -> None:
    """Refuse what would change the numbers and has no row in the tables."""
    if config.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{where} ties the output layer to the embedding; plait trains untied models only",
            hint="save it untied: the embedding again as lm_head.weight, and tie_word_embeddings false",
        )
    if architecture == QWEN2 and _slides(config):
        raise CheckpointError(f"{where} has use_sliding_window, which plait cannot convert yet")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(f"{where} has {key}; plait converts models without biases")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{where} has hidden_act {activation!r}; plait converts silu models")
    heads = _size(config, "num_attention_heads", where)
    groups = _size(config, "num_key_value_heads", where, default=heads)
    if heads % groups:
        raise CheckpointError(f"{where}: {heads} attention heads do not divide into {groups} key-value heads")


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """The rotary base: transformers 5 writes ``rope_parameters``, 4 writes ``rope_theta``."""
    rope = part(config, "rope_parameters", where) or part(config, "rope_scaling", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{where} scales its rotary embedding ({kind!r}), which plait cannot convert yet"
        )
    return float(_number(rope.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta", where))
