"""The parts of a LLaVA model beside its language model: a CLIP or SigLIP tower, and a projector.

In shapes: W = width of the tower, F = its feed-forward size, N = its positions, D = the language model's
hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from plait.errors import CheckpointError
from plait.models.families.fields import check_size, refuse_unknown

Shapes = dict[str, tuple[int, ...]]
KINDS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
}  # fmt: skip
"""What a ``vision_config`` leaves out has the default of transformers."""
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size",
)  # fmt: skip
OTHERS = ("num_channels", "vision_use_head", "projection_dim", "dropout", "vocab_size")
"""Fields beside those of :data:`DEFAULTS`; towers have no dropout here, and no projection of their own."""
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
FEATURE_LAYERS = (-2, -1)


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower, and which of its hidden states is projected."""

    kind: Literal["clip", "siglip"]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    feature_layer: int = -2
    drop_class_token: bool = True
    head: bool = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, where: str, feature_layer: int = -2, drop_class_token: bool = True
    ) -> Self:
        """Read a ``vision_config``, or the config.json of a tower.

        Raises:
            CheckpointError: it is of a kind that plait does not know.
        """
        kind = KINDS.get(str(config.get("model_type")))
        if kind is None:
            raise CheckpointError(
                f"{where} has a vision tower of type {config.get('model_type')!r}",
                hint=f"plait knows {', '.join(KINDS)}",
            )
        found = {**DEFAULTS[kind], **{key: value for key, value in config.items() if value is not None}}
        if found["hidden_act"] not in ACTIVATIONS or found.get("num_channels", 3) != 3:
            raise CheckpointError(
                f"{where}: a tower with hidden_act {found['hidden_act']!r} and "
                f"{found.get('num_channels', 3)} channels",
                hint=f"plait converts towers of 3 channels with {', '.join(ACTIVATIONS)}",
            )
        _check_sizes(found, where)
        refuse_unknown(config, {*DEFAULTS[kind], *OTHERS}, where)
        if feature_layer not in FEATURE_LAYERS:
            raise CheckpointError(f"{where} projects hidden state {feature_layer}; plait knows -2 and -1")
        if kind == "siglip" and drop_class_token:
            raise CheckpointError(
                f"{where} leaves the first feature of a SigLIP tower out, which has no class token",
                hint="set vision_feature_select_strategy to full",
            )
        return cls(
            kind=kind,  # type: ignore[arg-type]
            hidden_size=found["hidden_size"],
            intermediate_size=found["intermediate_size"],
            num_layers=found["num_hidden_layers"],
            num_attention_heads=found["num_attention_heads"],
            image_size=found["image_size"],
            patch_size=found["patch_size"],
            hidden_act=found["hidden_act"],
            layer_norm_eps=found["layer_norm_eps"],
            feature_layer=feature_layer,
            drop_class_token=drop_class_token,
            head=kind == "siglip" and bool(found["vision_use_head"]),
        )

    @property
    def class_token(self) -> bool:
        """Whether a token that is no patch stands first."""
        return self.kind == "clip"

    @property
    def num_key_value_heads(self) -> int:
        """Towers have as many key heads as query heads."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def used_layers(self) -> int:
        """Layers below the hidden state that is projected."""
        return self.num_layers + 1 + self.feature_layer

    @property
    def positions(self) -> int:
        """N: patches that fit whole, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    @property
    def tokens(self) -> int:
        """Tokens that the language model sees of one picture."""
        return self.positions - (self.class_token and self.drop_class_token)

    @property
    def shapes(self) -> Shapes:
        """Every parameter below ``vision_model.``, used or not."""
        w = self.hidden_size
        shapes: Shapes = {"embeddings.class_embedding": (w,)} if self.class_token else {}
        shapes["embeddings.patch_embedding.weight"] = (w, 3, self.patch_size, self.patch_size)
        if self.kind == "siglip":
            shapes["embeddings.patch_embedding.bias"] = (w,)
        shapes["embeddings.position_embedding.weight"] = (self.positions, w)
        if self.kind == "clip":
            shapes |= _norm("pre_layrnorm", w)
        for layer in range(self.num_layers):
            shapes |= {f"encoder.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        return shapes | _norm("post_layernorm", w) | (self._head() if self.head else {})

    def _layer(self) -> Shapes:
        w, f = self.hidden_size, self.intermediate_size
        shapes: Shapes = {}
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"self_attn.{name}", w, w)
        return shapes | _norm("layer_norm1", w) | self._mlp("mlp", f, w) | _norm("layer_norm2", w)

    def _head(self) -> Shapes:
        """SigLIP's pooling head."""
        w, f = self.hidden_size, self.intermediate_size
        shapes: Shapes = {
            "head.probe": (1, 1, w),
            "head.attention.in_proj_weight": (3 * w, w),
            "head.attention.in_proj_bias": (3 * w,),
        }
        return (
            shapes
            | _linear("head.attention.out_proj", w, w)
            | _norm("head.layernorm", w)
            | self._mlp("head.mlp", f, w)
        )

    @staticmethod
    def _mlp(name: str, f: int, w: int) -> Shapes:
        return _linear(f"{name}.fc1", f, w) | _linear(f"{name}.fc2", w, f)


def _check_sizes(found: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no tower of plait can have."""
    for key in SIZES:
        check_size(found[key], key, where)
    side, patch = found["image_size"], found["patch_size"]
    if side < patch:
        raise CheckpointError(f"{where}: no patch of {patch} pixels fits into a picture of {side}")
    width, heads = found["hidden_size"], found["num_attention_heads"]
    if width % heads:
        raise CheckpointError(f"{where}: a tower of width {width} does not divide into {heads} heads")
    if found["num_hidden_layers"] < 2:
        raise CheckpointError(
            f"{where}: a tower needs two layers or more to have a hidden state below the last"
        )


@dataclass(frozen=True, kw_only=True)
class Projector:
    """Linear, GELU, Linear: a feature of the tower to a token's place."""

    input_size: int
    hidden_size: int
    output_size: int
    bias: bool = True

    @property
    def shapes(self) -> Shapes:
        """Every parameter below ``multi_modal_projector.``."""
        first = _linear("linear_1", self.hidden_size, self.input_size, bias=self.bias)
        return first | _linear("linear_2", self.output_size, self.hidden_size, bias=self.bias)


def _linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
