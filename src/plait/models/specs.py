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
from plait.models.families import BY_ARCHITECTURE, BY_TEXT_TYPE
from plait.models.families.fields import check_flag, check_size, part, refuse_unknown
from plait.models.families.rope import PLAIN, Rope
from plait.models.towers import Projector, Tower

SOLO = "SoloForCausalLM"
LLAMA = "LlamaForCausalLM"
MIXTRAL = "MixtralForCausalLM"
LLAVA = "LlavaForConditionalGeneration"
ARCHITECTURES = (*BY_ARCHITECTURE, LLAVA)
TEXT_ARCHITECTURES = {name: family.architecture for name, family in BY_TEXT_TYPE.items()}
"""The language models of LLaVA, by the ``model_type`` of its ``text_config``."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The tensors with one row a token; a tied model computes its logits with the first, and has no other."""
TIE = "tie_word_embeddings"
LANGUAGE_MODEL, TOWER, PROJECTOR = "language_model.", "vision_tower.vision_model.", "multi_modal_projector."
"""Where the parts of a LLaVA model stand in its folder."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The shape of a model of one of :data:`ARCHITECTURES`.

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
    qk_norm: bool = False
    tied: bool = False
    rope: Rope = PLAIN
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
        found = BY_ARCHITECTURE[kind].read(text, where)
        return cls(
            architecture=architecture,
            text_architecture=kind,
            **found,
            dtype=next(
                (c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if c.get(k)), "float32"
            ),
            **(_pictures(config, found["hidden_size"], where) if architecture == LLAVA else {}),
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
    def config(self) -> dict[str, Any]:
        """The config.json of the language model; :meth:`from_config` reads the same shape out of it."""
        return BY_ARCHITECTURE[self.text_architecture].write(self)

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
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (v, d)}
        if self.patch_dim:
            shapes["model.embed_vision_patch.weight"] = (d, self.patch_dim)
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        return shapes | {"model.norm.weight": (d,)} | ({} if self.tied else {HEAD: (v, d)})

    def _layer(self) -> dict[str, tuple[int, ...]]:
        d, o, k = self.hidden_size, self.query_size, self.key_size
        norms = ("q_norm", "k_norm") if self.qk_norm else ()
        biases = {"q_proj": o, "k_proj": k, "v_proj": k} if self.attention_bias else {}
        return {
            **{f"self_attn.{name}.bias": (size,) for name, size in biases.items()},
            **{f"self_attn.{name}.weight": (self.head_dim,) for name in norms},
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
    return {**BY_ARCHITECTURE[kind].defaults, **text, TIE: ties(config, where), "architectures": [kind]}


def ties(config: Mapping[str, Any], where: str) -> bool:
    """Whether the output layer is the embedding; of LLaVA the whole or its language model may say so.

    transformers 4 writes it into the language model's part alone, and transformers 5 heeds both.

    Raises:
        CheckpointError: one of them says neither yes nor no.
    """
    parts = (config, part(config, "text_config", where))
    said = [check_flag(one.get(TIE), TIE, where) for one in parts]
    return any(said)


OF_LLAVA = (
    "text_config", "vision_config", "projector_hidden_act", "projector_hidden_size", "vision_feature_layer",
    "vision_feature_select_strategy", "multimodal_projector_bias", "image_token_id", "image_token_index",
    "image_seq_length", "tie_word_embeddings", "ignore_index", "vocab_size", "hidden_size",
)  # fmt: skip
"""Fields of a LLaVA config beside its parts'; the last three say again what the parts, or losses, say."""


def _pictures(config: Mapping[str, Any], hidden_size: int, where: str) -> dict[str, Any]:
    """Tower, projector and the picture's token of a LLaVA config."""
    vision = part(config, "vision_config", where)
    if not vision:
        raise CheckpointError(f"{where} has no vision_config")
    refuse_unknown(config, OF_LLAVA, where)
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
        hidden_size=check_size(
            config.get("projector_hidden_size") or hidden_size, "projector_hidden_size", where
        ),
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
