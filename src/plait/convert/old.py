"""Checkpoints of older worlds, read only: Megatron-LLM's layout, and the folders that LLaVA-JP combined.

Megatron-LLM (SOLO, CodeActAgent) has rotary rows in pairs, up before gate, names of its own in nested
dictionaries, and a head that is a bare tensor. LLaVA-JP's saver has Megatron Core's names but for the tower's
layers, a vocabulary as it is, modules in every stage that only one of them uses, and keys and values cut by
query heads, which scrambles them where groups are fewer. What Pai-Megatron-Patch combined has no projector,
so it is no model; what was trained from it has one, and Megatron Core's names.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.convert.ops import COLUMN, ROW, VOCAB, WHOLE, FuseGateUp, Held, PairedQKV, Part, QKVByHeads
from plait.convert.stream import Placed
from plait.convert.tables import LAYER, Entry, Row
from plait.errors import CheckpointError
from plait.models.specs import SOLO, Spec
from plait.models.stored import Stored
from plait.models.weights import check_shapes
from plait.parallel.grid import Grid
from plait.tokens.vocabulary import DIVISOR

log = logging.getLogger(__name__)

IN, HF = f"encoder.layers.{LAYER}.", f"model.layers.{LAYER}."
# fmt: off
ROWS: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight",         ("model.embed_tokens.weight",),     VOCAB, "first"),
    Row(IN + "input_layernorm.weight",              (HF + "input_layernorm.weight",),   WHOLE, "layer"),
    Row(IN + "post_attention_layernorm.weight",     (HF + "post_attention_layernorm.weight",),
                                                                                        WHOLE, "layer"),
    Row(IN + "self_attention.query_key_value.weight",
                                                    (HF + "self_attn.q_proj.weight",
                                                     HF + "self_attn.k_proj.weight",
                                                     HF + "self_attn.v_proj.weight"),   PairedQKV(), "layer"),
    Row(IN + "self_attention.dense.weight",         (HF + "self_attn.o_proj.weight",),  ROW, "layer"),
    Row(IN + "mlp.dense_h_to_4h.weight",            (HF + "mlp.up_proj.weight",
                                                     HF + "mlp.gate_proj.weight"),
                                                                                FuseGateUp(), "layer"),
    Row(IN + "mlp.dense_4h_to_h.weight",            (HF + "mlp.down_proj.weight",),     ROW, "layer"),
    Row("encoder.final_layernorm.weight",           ("model.norm.weight",),             WHOLE, "last"),
    Row("lm_head",                                  ("lm_head.weight",),                VOCAB, "last"),
)
PATCHES = Row("embed_vision_patch.weight",          ("model.embed_vision_patch.weight",), COLUMN, "first")
# fmt: on
RAW_NAMES = (("transformer.", "encoder."), (".attention.", ".self_attention."))
"""What the first conversion calls them, and what everything after it does."""
QKV = re.compile(r"^language_model\..*linear_qkv\.weight$")


def is_megatron_llm(model: Any) -> bool:
    """Whether a file's model is in Megatron-LLM's layout."""
    return isinstance(model, dict) and isinstance(model.get("language_model"), dict)


def is_llava_jp(model: Mapping[str, Any]) -> bool:
    """Whether a file's model is one that LLaVA-JP combined."""
    return any(name.startswith("vision_model.transformer.layers.") for name in model)


def refuse_halves(path: Path, model: Mapping[str, Any]) -> None:
    """Refuse a file that Pai-Megatron-Patch combined: a language model and a tower, nothing between them.

    Raises:
        CheckpointError: it is one.
    """
    parts = {name.partition(".")[0] for name in model}
    if {"language_model", "vision_model"} <= parts and "vision_projection" not in parts:
        raise CheckpointError(
            f"{path} lacks vision_projection.encoder.linear_fc1.weight: it has a language model and a vision "
            "tower without a projector, as Pai-Megatron-Patch combines them before anything is trained",
            hint="`plait build` makes the model of the two Hugging Face folders that it was combined of: "
            "`kind: llava` of raw_hf, with `projector` or a drawn one",
        )


def megatron_llm(
    path: Path, model: Mapping[str, Any], spec: Spec, grid: Grid, place: tuple[int, int]
) -> list[Placed]:
    """What a rank's file of Megatron-LLM holds.

    Args:
        path: the file.
        model: its ``model``.
        spec: the model.
        grid: its grid.
        place: its tensor rank and its stage.

    Raises:
        CheckpointError: it does not hold what the config promises.
    """
    state = {_encoder_name(name): one for name, one in _flat(model["language_model"])}
    divisor = padding_of(state, ("embedding.word_embeddings.weight", "lm_head"), spec, grid.tp)
    held: dict[str, Held] = {}
    for entry in _entries(spec):
        if entry.stage(spec, grid) == place[1]:
            shapes = [spec.shapes[name] for name in entry.hf]
            held[entry.local(spec, grid)] = entry.row.op.held(
                entry.hf, shapes, spec, Part(place[0], grid.tp, divisor)
            )
    check_shapes(
        {n: one.shape for n, one in state.items()}, {n: one.shape for n, one in held.items()}, str(path)
    )
    return [Placed(name, state[name], one) for name, one in held.items()]


def _entries(spec: Spec) -> Iterator[Entry]:
    """Every parameter of a model in that layout."""
    rows = (*ROWS, *([PATCHES] if spec.architecture == SOLO else []))
    for row in rows:
        for layer in range(spec.num_layers if row.place == "layer" else 1):
            mcore, hf = row.names(layer=layer)
            yield Entry(row=row, layer=layer, mcore=mcore, hf=hf, shape=spec)


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Stored]]:
    """The tensors of nested dictionaries, their keys joined by dots."""
    for name, one in value.items():
        if isinstance(one, Stored):
            yield before + name, one
        elif isinstance(one, dict):
            yield from _flat(one, f"{before}{name}.")


def _encoder_name(name: str) -> str:
    for raw, later in RAW_NAMES:
        name = name.replace(raw, later, 1)
    return name


def padding_of(
    state: Mapping[str, Stored], names: Sequence[str], spec: Spec, tp: int, divisor: int = DIVISOR
) -> int:
    """What a vocabulary was padded to a multiple of: 1 where its rows are the model's."""
    rows = next((state[name].shape[0] for name in names if name in state and state[name].shape), 0)
    return 1 if rows * tp == spec.vocab_size else divisor


def llava_jp(
    path: Path, state: Mapping[str, Stored], form: Mapping[str, Held], spec: Spec, part: Part
) -> list[Placed]:
    """What a rank's file of LLaVA-JP holds, of what the rank's form says.

    Args:
        path: the file.
        state: its tensors, by the names that it has.
        form: what a rank holds in Megatron Core's layout.
        spec: the model.
        part: the tensor rank.

    Raises:
        CheckpointError: it lacks a tensor, or one has another shape.
    """
    found = {
        name.replace("vision_model.transformer.layers.", "vision_model.decoder.layers."): one
        for name, one in state.items()
    }
    fewer = spec.num_key_value_heads < spec.num_attention_heads
    held = {
        name: _by_heads(one, spec, part) if fewer and QKV.search(name) else one for name, one in form.items()
    }
    dropped = sorted(found.keys() - held.keys())
    if dropped:
        log.info(
            "%s: %d tensors that this stage does not use are left out: %s",
            path,
            len(dropped),
            ", ".join(dropped),
        )
    if fewer and part.rank == 0:
        log.warning(
            "%s: keys and values were cut by %d query heads and not by their %d groups; they are put back, "
            "but what was trained so was another network",
            path, spec.num_attention_heads, spec.num_key_value_heads,
        )  # fmt: skip
    check_shapes(
        {name: one.shape for name, one in found.items() if name in held},
        {name: one.shape for name, one in held.items()},
        str(path),
    )
    return [Placed(name, found[name], one) for name, one in held.items()]


def _by_heads(held: Held, spec: Spec, part: Part) -> Held:
    """What a fused tensor of the language model holds there."""
    names = tuple(dict.fromkeys(piece.hf for piece in held.pieces))
    return QKVByHeads().held(names, [spec.shapes[name] for name in names], spec, part)
