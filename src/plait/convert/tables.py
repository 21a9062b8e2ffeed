"""Which Megatron parameter is made of which Hugging Face ones, by what operation, on which stage.

Every direction reads these rows: import, export, cutting, joining and the proof of coverage. A
model is a sum of tables. Megatron's names are those of its local layer spec; where Transformer
Engine's fused modules give a parameter another name, the row has both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from plait.convert.ops import COLUMN, ROW, VOCAB, WHOLE, FuseGateUp, FuseQKV, Op
from plait.models.specs import Spec
from plait.parallel.grid import Grid

Place = Literal["first", "layer", "last"]
LAYER = "{layer}"


@dataclass(frozen=True)
class Row:
    """One Megatron parameter; ``{layer}`` stands for a layer's number in its names."""

    mcore: str
    hf: tuple[str, ...]
    op: Op
    place: Place
    engine: str = ""

    def names(self, layer: int) -> tuple[str, tuple[str, ...]]:
        """The Megatron name and the Hugging Face names at a layer."""
        return self.mcore.format(layer=layer), tuple(name.format(layer=layer) for name in self.hf)


def layer(mcore: str, *hf: str, op: Op, engine: str = "") -> Row:
    """A row of every transformer layer, with its names below the layer."""
    below = f"decoder.layers.{LAYER}."
    names = tuple(f"model.layers.{LAYER}.{name}" for name in hf)
    return Row(below + mcore, names, op, "layer", engine=below + engine if engine else "")


# fmt: off
MISTRAL: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",),             VOCAB, "first"),
    layer("input_layernorm.weight",             "input_layernorm.weight",               op=WHOLE,
          engine="self_attention.linear_qkv.layer_norm_weight"),
    layer("self_attention.linear_qkv.weight",   "self_attn.q_proj.weight",
                                                "self_attn.k_proj.weight",
                                                "self_attn.v_proj.weight",              op=FuseQKV()),
    layer("self_attention.linear_proj.weight",  "self_attn.o_proj.weight",              op=ROW),
    layer("pre_mlp_layernorm.weight",           "post_attention_layernorm.weight",      op=WHOLE,
          engine="mlp.linear_fc1.layer_norm_weight"),
    layer("mlp.linear_fc1.weight",              "mlp.gate_proj.weight",
                                                "mlp.up_proj.weight",                   op=FuseGateUp()),
    layer("mlp.linear_fc2.weight",              "mlp.down_proj.weight",                 op=ROW),
    Row("decoder.final_layernorm.weight",       ("model.norm.weight",),                 WHOLE, "last"),
    Row("output_layer.weight",                  ("lm_head.weight",),                    VOCAB, "last"),
)
PATCHES: tuple[Row, ...] = (
    Row("vision_patch.weight",                  ("model.embed_vision_patch.weight",),   COLUMN, "first"),
)
# fmt: on

TABLES: dict[str, tuple[Row, ...]] = {
    "MistralForCausalLM": MISTRAL,
    "LlamaForCausalLM": MISTRAL,
    "SoloForCausalLM": MISTRAL + PATCHES,
}


@dataclass(frozen=True)
class Entry:
    """A row at one place of one model: its names are complete."""

    row: Row
    layer: int
    mcore: str
    hf: tuple[str, ...]

    def stage(self, spec: Spec, grid: Grid) -> int:
        """The pipeline stage that holds the parameter."""
        if self.row.place == "layer":
            return grid.stage_of(self.layer, num_layers=spec.num_layers)
        return 0 if self.row.place == "first" else grid.pp - 1

    def local(self, spec: Spec, grid: Grid) -> str:
        """The name within its stage, whose layers are numbered from 0."""
        first = grid.layers(self.stage(spec, grid), num_layers=spec.num_layers).start
        return self.row.names(self.layer - first)[0] if self.row.place == "layer" else self.mcore

    @cached_property
    def stacked(self) -> tuple[str, ...]:
        """Names in a torch_dist checkpoint, where the layers of a model are one tensor."""
        names = (self.row.engine, self.row.mcore)
        return tuple(name.replace(f".{LAYER}.", ".") for name in names if name)


def entries(spec: Spec) -> Iterator[Entry]:
    """Every parameter of a model, in the order of its layers."""
    table = TABLES[spec.architecture]
    for place, layers in (("first", 1), ("layer", spec.num_layers), ("last", 1)):
        for number in range(layers):
            for row in table:
                if row.place == place:
                    mcore, hf = row.names(number)
                    yield Entry(row=row, layer=number, mcore=mcore, hf=hf)
