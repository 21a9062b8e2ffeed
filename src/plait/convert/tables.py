"""Which Megatron parameter is made of which Hugging Face ones, by what operation, on which stage.

Every direction reads these rows: import, export, cutting, joining and the proof of coverage. A
model is a sum of tables. Megatron's names are those of its local layer spec; where Transformer
Engine's fused modules give a parameter another name, the row has both.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

from plait.convert.ops import COLUMN, ROW, VOCAB, WHOLE, FuseGateUp, FuseQKV, Lifted, Op, Sizes
from plait.models.specs import LANGUAGE_MODEL, PROJECTOR, TOWER, Spec
from plait.parallel.grid import Grid

Place = Literal["first", "layer", "last", "tower layer"]
Layers = Literal["local", "te", "te-grouped"]
"""Megatron Core's own, Transformer Engine's, or these with the experts of a layer as one module."""
LAYER, EXPERT = "{layer}", "{expert}"


@dataclass(frozen=True)
class Row:
    """One Megatron parameter; ``{layer}`` and ``{expert}`` stand for numbers in its names."""

    mcore: str
    hf: tuple[str, ...]
    op: Op
    place: Place
    engine: str = ""
    tied: bool = False
    """Whether it is a copy, which the last of several stages needs of what the first has."""

    def names(self, **numbers: int) -> tuple[str, tuple[str, ...]]:
        """The Megatron name and the Hugging Face names at a ``layer``, of an ``expert``."""
        return self.mcore.format(**numbers), tuple(name.format(**numbers) for name in self.hf)

    @property
    def is_experts(self) -> bool:
        """Whether every expert of a layer has the parameter."""
        return EXPERT in self.mcore

    def below(self, mcore: str, hf: str) -> "Row":
        """The same row where the model is a part of another: its names below prefixes."""
        return replace(
            self,
            mcore=mcore + self.mcore,
            hf=tuple(hf + name for name in self.hf),
            engine=mcore + self.engine if self.engine else "",
        )


def layer(mcore: str, *hf: str, op: Op, engine: str = "") -> Row:
    """A row of every transformer layer, with its names below the layer."""
    below = f"decoder.layers.{LAYER}."
    names = tuple(f"model.layers.{LAYER}.{name}" for name in hf)
    return Row(below + mcore, names, op, "layer", engine=below + engine if engine else "")


def expert(mcore: str, *hf: str, op: Op) -> Row:
    """A row of every expert of every layer, with its names below the expert.

    Megatron's grouped experts, where Transformer Engine computes them, number one module's weights.
    """
    names = (f"block_sparse_moe.experts.{EXPERT}.{name}" for name in hf)
    grouped = f"mlp.experts.{mcore}{EXPERT}"
    return layer(f"mlp.experts.local_experts.{EXPERT}.{mcore}", *names, op=op, engine=grouped)


def tower(mcore: str, *hf: str, op: Op, engine: str = "") -> tuple[Row, Row]:
    """A weight and a bias of every layer of a vision tower, with their names below the layer.

    A bias is cut as its weight's rows are; that of a row-wise weight is whole on every rank.
    """
    below = f"decoder.layers.{LAYER}."
    names = tuple(f"encoder.layers.{LAYER}.{name}" for name in hf)

    def row(part: str, op: Op) -> Row:
        fused = below + engine + part if engine else ""
        return Row(below + mcore + part, tuple(n + part for n in names), op, "tower layer", engine=fused)

    return row("weight", op), row("bias", WHOLE if op is ROW else op)


# fmt: off
STEM: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",),             VOCAB, "first"),
    layer("input_layernorm.weight",             "input_layernorm.weight",               op=WHOLE,
          engine="self_attention.linear_qkv.layer_norm_weight"),
    layer("self_attention.linear_qkv.weight",   "self_attn.q_proj.weight",
                                                "self_attn.k_proj.weight",
                                                "self_attn.v_proj.weight",              op=FuseQKV()),
    layer("self_attention.linear_proj.weight",  "self_attn.o_proj.weight",              op=ROW),
    layer("pre_mlp_layernorm.weight",           "post_attention_layernorm.weight",      op=WHOLE,
          engine="mlp.linear_fc1.layer_norm_weight"),
)
FEED_FORWARD: tuple[Row, ...] = (
    layer("mlp.linear_fc1.weight",              "mlp.gate_proj.weight",
                                                "mlp.up_proj.weight",                   op=FuseGateUp()),
    layer("mlp.linear_fc2.weight",              "mlp.down_proj.weight",                 op=ROW),
)
EXPERTS: tuple[Row, ...] = (
    layer("mlp.router.weight",                  "block_sparse_moe.gate.weight",         op=WHOLE),
    expert("linear_fc1.weight",                 "w1.weight", "w3.weight",               op=FuseGateUp()),
    expert("linear_fc2.weight",                 "w2.weight",                            op=ROW),
)
ENDS: tuple[Row, ...] = (
    Row("decoder.final_layernorm.weight",       ("model.norm.weight",),                 WHOLE, "last"),
    Row("output_layer.weight",                  ("lm_head.weight",),                    VOCAB, "last"),
)
TIED: tuple[Row, ...] = (
    ENDS[0],
    Row("output_layer.weight",                  ("model.embed_tokens.weight",),         VOCAB, "last",
        tied=True),
)
PATCHES: tuple[Row, ...] = (
    Row("vision_patch.weight",                  ("model.embed_vision_patch.weight",),   COLUMN, "first"),
)
QKV_BIAS: tuple[Row, ...] = (
    layer("self_attention.linear_qkv.bias",     "self_attn.q_proj.bias",
                                                "self_attn.k_proj.bias",
                                                "self_attn.v_proj.bias",                op=FuseQKV()),
)
QK_NORM: tuple[Row, ...] = (
    layer("self_attention.q_layernorm.weight",  "self_attn.q_norm.weight",              op=WHOLE),
    layer("self_attention.k_layernorm.weight",  "self_attn.k_norm.weight",              op=WHOLE),
)
TOWER_ENDS: tuple[Row, ...] = (
    Row("conv1.weight",                         ("embeddings.patch_embedding.weight",), WHOLE, "first"),
    Row("position_embeddings.weight",           ("embeddings.position_embedding.weight",), WHOLE, "first"),
)
TOWER_LAYER: tuple[Row, ...] = (
    *tower("input_layernorm.",                  "layer_norm1.",                         op=WHOLE,
           engine="self_attention.linear_qkv.layer_norm_"),
    *tower("self_attention.linear_qkv.",        "self_attn.q_proj.", "self_attn.k_proj.",
                                                "self_attn.v_proj.",                    op=FuseQKV()),
    *tower("self_attention.linear_proj.",       "self_attn.out_proj.",                  op=ROW),
    *tower("pre_mlp_layernorm.",                "layer_norm2.",                         op=WHOLE,
           engine="mlp.linear_fc1.layer_norm_"),
    *tower("mlp.linear_fc1.",                   "mlp.fc1.",                             op=COLUMN),
    *tower("mlp.linear_fc2.",                   "mlp.fc2.",                             op=ROW),
)
TOWERS: dict[str, tuple[Row, ...]] = {
    "clip": (
        Row("class_token",                      ("embeddings.class_embedding",),        Lifted(), "first"),
        *TOWER_ENDS,
        Row("ln_pre.weight",                    ("pre_layrnorm.weight",),               WHOLE, "first"),
        Row("ln_pre.bias",                      ("pre_layrnorm.bias",),                 WHOLE, "first"),
        *TOWER_LAYER,
    ),
    "siglip": (
        *TOWER_ENDS,
        Row("conv1.bias",                       ("embeddings.patch_embedding.bias",),   WHOLE, "first"),
        *TOWER_LAYER,
    ),
}
PROJECTION: tuple[Row, ...] = (
    Row("encoder.linear_fc1.weight",            ("linear_1.weight",),                   COLUMN, "first"),
    Row("encoder.linear_fc2.weight",            ("linear_2.weight",),                   ROW, "first"),
)
PROJECTION_BIAS: tuple[Row, ...] = (
    Row("encoder.linear_fc1.bias",              ("linear_1.bias",),                     COLUMN, "first"),
    Row("encoder.linear_fc2.bias",              ("linear_2.bias",),                     WHOLE, "first"),
)
# fmt: on

MISTRAL = STEM + FEED_FORWARD + ENDS
TABLES: dict[str, tuple[Row, ...]] = {
    "MistralForCausalLM": MISTRAL,
    "LlamaForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": MISTRAL + QKV_BIAS,
    "Qwen3ForCausalLM": MISTRAL + QK_NORM,
    "MixtralForCausalLM": STEM + EXPERTS + ENDS,
    "SoloForCausalLM": MISTRAL + PATCHES,
}


def rows_of(spec: Spec) -> tuple[Row, ...]:
    """The rows of a language model; a tied one has no head, and its last stage a copy of the embedding."""
    rows = TABLES[spec.text_architecture]
    return (*(row for row in rows if row not in ENDS), *TIED) if spec.tied else rows


@dataclass(frozen=True)
class Part:
    """A table, and the shape that its operations read."""

    rows: tuple[Row, ...]
    shape: Sizes
    places: tuple[tuple[Place, int], ...]
    """Where its rows stand, and how often."""
    experts: int = 0
    """Experts of each layer."""


def parts(spec: Spec) -> Iterator[Part]:
    """The tables that a model is a sum of."""
    language: tuple[tuple[Place, int], ...] = (("first", 1), ("layer", spec.num_layers), ("last", 1))
    if spec.vision is None or spec.projector is None:
        yield Part(rows_of(spec), spec, language, spec.num_experts)
        return
    seen: tuple[tuple[Place, int], ...] = (("first", 1), ("tower layer", spec.vision.used_layers))
    tower_rows = tuple(row.below("vision_model.", TOWER) for row in TOWERS[spec.vision.kind])
    yield Part(tower_rows, spec.vision, seen)
    both = PROJECTION + (PROJECTION_BIAS if spec.projector.bias else ())
    yield Part(tuple(row.below("vision_projection.", PROJECTOR) for row in both), spec, (("first", 1),))
    rows = tuple(row.below("language_model.", LANGUAGE_MODEL) for row in rows_of(spec))
    yield Part(rows, spec, language, spec.num_experts)


def carried(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensors that Megatron does not compute with, and their shapes.

    They are the layers of a tower above the one that is projected, its last norm and SigLIP's pooling head.
    """
    used = {name for entry in entries(spec) for name in entry.hf}
    return {name: shape for name, shape in spec.shapes.items() if _unused(spec, name) and name not in used}


def _unused(spec: Spec, name: str) -> bool:
    if spec.vision is None or not name.startswith(TOWER):
        return False
    below = name.removeprefix(TOWER)
    layer = re.match(r"encoder\.layers\.(\d+)\.", below)
    above = layer is not None and int(layer[1]) >= spec.vision.used_layers
    return above or below.startswith(("post_layernorm.", "head."))


@dataclass(frozen=True)
class Entry:
    """A row at one place of one model: its names are complete."""

    row: Row
    layer: int
    mcore: str
    hf: tuple[str, ...]
    shape: Sizes
    expert: int = 0
    layers: int = 1
    """How many layers have the row."""

    @property
    def part(self) -> str:
        """The part of the model that it belongs to: ``vision_model`` and so on, where it is LLaVA's."""
        return self.mcore.partition(".")[0]

    def stage(self, spec: Spec, grid: Grid) -> int:
        """The pipeline stage that holds the parameter."""
        if self.row.place == "layer":
            return grid.stage_of(self.layer, num_layers=spec.num_layers)
        return grid.pp - 1 if self.row.place == "last" else 0

    def local(self, spec: Spec, grid: Grid, *, first_expert: int = 0) -> str:
        """The name within its stage: layers are numbered from its first, experts from ``first_expert``."""
        return self.row.mcore.format(layer=self._number(spec, grid), expert=self.expert - first_expert)

    def local_engine(self, spec: Spec, grid: Grid) -> str:
        """The same where Transformer Engine's layers were trained; empty where it is the same name."""
        return self.row.engine.format(layer=self._number(spec, grid), expert=self.expert)

    def _number(self, spec: Spec, grid: Grid) -> int:
        """The number of its layer within its stage; a tower stands whole on the first."""
        if self.row.place != "layer":
            return self.layer
        return self.layer - grid.layers(self.stage(spec, grid), num_layers=spec.num_layers).start

    @cached_property
    def stacked(self) -> tuple[str, ...]:
        """Names in a torch_dist checkpoint, where layers, and their experts, are one tensor."""
        fused = "" if self.row.is_experts else self.row.engine
        names = (fused, self.row.mcore.replace(f"local_experts.{EXPERT}", "experts"))
        return tuple(name.replace(f".{LAYER}.", ".") for name in names if name)

    @property
    def place_in_stack(self) -> tuple[int, ...]:
        """Its layer, and its expert, in that tensor; nothing where it is a tensor of its own."""
        layer = (self.layer,) if LAYER in self.row.mcore else ()
        return (*layer, self.expert) if self.row.is_experts else layer


def engine_name(name: str) -> str:
    """The name that a parameter of a language model has in Transformer Engine's layers.

    Args:
        name: Megatron Core's own, below whatever the model is a part of.

    Returns:
        The same name, where they have no other.
    """
    return _fused(name, STEM + EXPERTS)


def file_name(name: str, layers: Layers, *, routed: bool) -> str:
    """The name that a parameter has in a classic file of Megatron-LM.

    Args:
        name: Megatron Core's own.
        layers: whose layers compute the model, a vision tower too.
        routed: whether experts do, in place of the feed-forward network: the norm before them is not fused.
    """
    if layers == "local":
        return name
    if name.startswith("vision_model."):
        return _fused(name, TOWER_LAYER)
    within = tuple(row for row in STEM if not (routed and "pre_mlp" in row.mcore))
    return _fused(name, within + (EXPERTS if layers == "te-grouped" else ()))


def _fused(name: str, rows: tuple[Row, ...]) -> str:
    """The name in Transformer Engine's layers, of a row that has another there."""
    for own, engine in _renamed(rows):
        found = own.search(name)
        if found:
            return name[: found.start()] + engine.format_map(found.groupdict())
    return name


@cache
def _renamed(all_rows: tuple[Row, ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Patterns of names with another in Transformer Engine's layers, and that one."""
    rows = [row for row in all_rows if row.engine]
    patterns = [re.escape(row.mcore) + "$" for row in rows]
    for place in (LAYER, EXPERT):
        number = rf"(?P<{place[1:-1]}>\d+)"
        patterns = [pattern.replace(re.escape(place), number) for pattern in patterns]
    return tuple((re.compile(p), row.engine) for p, row in zip(patterns, rows, strict=True))


def entries(spec: Spec, pp: int = 1) -> Iterator[Entry]:
    """Every parameter of a model, in the order of its layers.

    Args:
        spec: the model.
        pp: pipeline stages; where there are several, the last has copies of tied tensors.
    """
    for part in parts(spec):
        for place, layers in part.places:
            for number in range(layers):
                for row in part.rows:
                    if row.place == place and (pp > 1 or not row.tied):
                        yield from _of_row(row, part, number, layers)


def _of_row(row: Row, part: Part, layer: int, layers: int) -> Iterator[Entry]:
    """A row at a layer: once, or once an expert."""
    for number in range(part.experts if row.is_experts else 1):
        mcore, hf = row.names(layer=layer, expert=number)
        yield Entry(row=row, layer=layer, mcore=mcore, hf=hf, shape=part.shape, expert=number, layers=layers)
