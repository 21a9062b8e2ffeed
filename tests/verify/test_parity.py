"""The proof passes on every grid, and no classic fault of a converter passes it."""

import dataclasses
import json
from pathlib import Path

import megatron.core.models.gpt  # noqa: F401 - loaded once here, not in every forked rank
import pytest
import torch
import transformers.models.mistral.modeling_mistral  # noqa: F401

from plait import files
from plait.convert import ops, tables
from plait.errors import PlaitError, ProofError
from plait.models.specs import Spec
from plait.models.weights import merkle
from plait.parallel.grid import Grid
from plait.verify import logits, parity
from plait.verify.ranks import run_ranks

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("kind", ["hf", "solo"])
@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_a_sharded_model_computes_what_transformers_computes(maker, kind, tp, pp, tmp_path):
    source = getattr(maker, kind)()
    found = parity.prove_converted(source, maker.shards(source, tp, pp), tmp_path / "parity.json")
    assert found == json.loads((tmp_path / "parity.json").read_text())
    assert found["merkle_root"] == files.read_manifest(source)["facts"]["merkle"]
    assert found["grid"] == {"tp": tp, "pp": pp}
    assert {row["case"] for row in found["logits"]} == {"text", "packed"} | (
        {"picture"} if kind == "solo" else set()
    )
    for row in found["logits"]:
        assert row["max_abs_diff"] <= row["tolerance"] == 1e-5
        assert row["max_abs_diff_fp32"] <= 1e-5
        assert row["top1_equal"] == row["positions"] == 96
        assert row["max_abs_logit"] > 0.5  # a model that says nothing proves nothing


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1)])
def test_multi_head_and_multi_query_attention_are_proven(maker, heads, groups, tmp_path):
    source = maker.hf(f"{heads}-{groups}", num_attention_heads=heads, num_key_value_heads=groups)
    parity.prove_converted(source, maker.megatron(source), tmp_path / "whole.json")
    parity.prove_converted(source, maker.shards(source, min(groups, 2), 2), tmp_path / "shards.json")


def test_a_sliding_window_is_proven(maker, tmp_path):
    """Mistral v0.1 sees 4,096 tokens back; here 8 of the proof's 48."""
    source = tmp_path / "windowed"
    source.mkdir()
    for path in maker.hf().iterdir():
        if path.name != "plait.json":
            (source / path.name).write_bytes(path.read_bytes())
    config = files.read_json(source / "config.json")
    files.write_json(source / "config.json", {**config, "sliding_window": 8})
    facts = files.read_manifest(maker.hf())["facts"]
    files.write_manifest(source, kind="hf_model", settings={}, facts=facts)
    prove_with(source, tmp_path / "run", 2, 1)


# Faults. Each changes the converter as a tired engineer might, in both directions at once, so that a
# round trip and with it the Merkle root may well agree; and each must be caught by some part of the proof.


class SwappedGateUp(ops.FuseGateUp):
    def held(self, names, shapes, sizes, part):
        return super().held(names[::-1], shapes[::-1], sizes, part)


class NaiveGateUpCut(ops.FuseGateUp):
    """Gate and up stacked, and then cut as one."""

    def held(self, names, shapes, sizes, part):
        rows, cols = shapes[0]
        share = 2 * rows // part.tp
        first = part.rank * share
        pieces = [
            ops.Piece(names[row // rows], row % rows, 0, 1, cols, row - first, 0)
            for row in range(first, first + share)
        ]
        return ops.Held((share, cols), tuple(pieces))


class NaiveQKV(ops.Column):
    """q, k and v one after the other, not interleaved by group."""


class HeadsForGroups(ops.Op):
    """Named in seed 003: k and v reshaped with the number of heads, undone by the same mistake."""

    def held(self, names, shapes, sizes, part):
        heads = sizes.num_attention_heads // part.tp
        pieces, at = [], 0
        for head in range(part.rank * heads, (part.rank + 1) * heads):
            for name, shape in zip(names, shapes, strict=True):
                rows, cols = ops.matrix(shape)
                rows //= sizes.num_attention_heads
                pieces.append(ops.Piece(name, head * rows, 0, rows, cols, at, 0))
                at += rows
        return ops.Held((at, *shapes[0][1:]), tuple(pieces))


class QKVByColumns(ops.FuseQKV):
    def held(self, names, shapes, sizes, part):
        whole = super().held(names, shapes, sizes, ops.Part())
        share = whole.shape[1] // part.tp
        pieces = tuple(piece._replace(col=part.rank * share, cols=share) for piece in whole.pieces)
        return ops.Held((whole.shape[0], share), pieces)


class ReversedRanks(ops.RowWise):
    def held(self, names, shapes, sizes, part):
        return super().held(names, shapes, sizes, part._replace(rank=part.tp - 1 - part.rank))


def with_op(name, op):
    """Give the rows whose Megatron name ends so another operation."""

    def change(monkeypatch):
        for architecture, table in tables.TABLES.items():
            rows = tuple(
                dataclasses.replace(row, op=op) if row.mcore.endswith(name) else row for row in table
            )
            assert rows != table
            monkeypatch.setitem(tables.TABLES, architecture, rows)

    return change


def off_by_one_stage(monkeypatch):
    """The second stage's layers in a circle: each holds its neighbour's weights."""
    straight = tables.Entry.local

    def turned(self, spec, grid, **experts):
        name = straight(self, spec, grid, **experts)
        layers = grid.layers(self.stage(spec, grid), num_layers=spec.num_layers)
        if self.row.place != "layer":
            return name
        return self.row.names(layer=(self.layer - layers.start + 1) % len(layers))[0]

    monkeypatch.setattr(tables.Entry, "local", turned)


def split_one_layer_late(monkeypatch):
    """Stage 0 takes a layer more than its share."""
    straight = Grid.layers

    def late(self, stage, *, num_layers):
        found = straight(self, stage, num_layers=num_layers)
        shift = 1 if self.pp > 1 else 0
        return range(found.start + (shift if stage else 0), found.stop + (0 if stage else shift))

    monkeypatch.setattr(Grid, "layers", late)


def missing_head(monkeypatch):
    for architecture, table in tables.TABLES.items():
        rows = tuple(row for row in table if row.mcore != "output_layer.weight")
        monkeypatch.setitem(tables.TABLES, architecture, rows)


def head_from_embedding(monkeypatch):
    """Both vocabulary rows read the embedding: what a careless tie does."""
    for architecture, table in tables.TABLES.items():
        rows = tuple(
            dataclasses.replace(row, hf=("model.embed_tokens.weight",))
            if row.mcore == "output_layer.weight"
            else row
            for row in table
        )
        monkeypatch.setitem(tables.TABLES, architecture, rows)


def wrong_rope_base(monkeypatch):
    straight = Spec.from_config.__func__

    def changed(cls, config, **where):
        return dataclasses.replace(straight(cls, config, **where), rope_theta=1_000_000.0)

    monkeypatch.setattr(Spec, "from_config", classmethod(changed))


def default_norm_eps(monkeypatch):
    straight = Spec.from_config.__func__

    def changed(cls, config, **where):
        return dataclasses.replace(straight(cls, config, **where), rms_norm_eps=1e-2)

    monkeypatch.setattr(Spec, "from_config", classmethod(changed))


def norms_swapped(monkeypatch):
    """input_layernorm and post_attention_layernorm in each other's place."""
    swap = {"input_layernorm.weight": "post_attention_layernorm.weight"}
    swap |= {new: old for old, new in swap.items()}
    for architecture, table in tables.TABLES.items():
        rows = []
        for row in table:
            below = row.hf[0].removeprefix("model.layers.{layer}.")
            rows.append(
                dataclasses.replace(row, hf=(f"model.layers.{{layer}}.{swap[below]}",))
                if below in swap
                else row
            )
        monkeypatch.setitem(tables.TABLES, architecture, tuple(rows))


FAULTS = {
    "gate and up swapped": (with_op("linear_fc1.weight", SwappedGateUp()), "logits"),
    "gate and up cut as one": (with_op("linear_fc1.weight", NaiveGateUpCut()), "logits"),
    "qkv not interleaved": (with_op("linear_qkv.weight", NaiveQKV()), "logits"),
    "qkv by heads, not groups": (with_op("linear_qkv.weight", HeadsForGroups()), "logits"),
    "row for column": (with_op("linear_proj.weight", ops.COLUMN), "shapes"),
    "column for row": (with_op("linear_qkv.weight", QKVByColumns()), "shapes"),
    "ranks in reverse": (with_op("linear_fc2.weight", ReversedRanks()), "logits"),
    "layers of a stage turned": (off_by_one_stage, "merkle"),
    "pipeline split off by one": (split_one_layer_late, "names"),
    "head missing": (missing_head, "merkle"),
    "head read from the embedding": (head_from_embedding, "merkle"),
    "wrong rope base": (wrong_rope_base, "logits"),
    "wrong norm epsilon": (default_norm_eps, "logits"),
    "norms in each other's place": (norms_swapped, "logits"),
}


@pytest.fixture
def lively(maker):
    """A model whose norms differ, so that their places show."""
    from safetensors.torch import load_file, save_file

    source = maker.root / "lively"
    if not source.exists():
        source.mkdir()
        for path in maker.hf().iterdir():
            if path.name != "plait.json":
                (source / path.name).write_bytes(path.read_bytes())
        weights = load_file(source / "model.safetensors")
        draw = torch.Generator().manual_seed(3)
        for name, tensor in weights.items():
            if "norm" in name:
                weights[name] = 1 + 0.3 * torch.randn(tensor.shape, generator=draw)
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        files.write_manifest(source, kind="hf_model", settings={}, facts={"merkle": merkle(weights)})
    return source


def prove_with(source: Path, root: Path, tp: int, pp: int) -> None:
    """Convert, cut and prove with whatever the converter is now."""
    from makers import made

    from plait.convert import folders

    root.mkdir()
    whole = made(root / "whole", "megatron", lambda f: folders.convert(source, f))
    cut = made(root / "cut", "sharded", lambda f: folders.shard(whole, f, Grid(tp, pp)))
    parity.prove_converted(source, cut, root / "parity.json")


def test_the_lively_model_is_proven_without_a_fault(lively, tmp_path):
    prove_with(lively, tmp_path / "run", 2, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_converter_passes_the_proof(fault, lively, tmp_path, monkeypatch):
    change, killer = FAULTS[fault]
    change(monkeypatch)
    with pytest.raises(PlaitError) as caught:
        prove_with(lively, tmp_path / "run", 2, 2)
    assert not (tmp_path / "run" / "parity.json").exists()
    said = str(caught.value)
    words = {
        "logits": "max abs difference",
        "merkle": "Merkle root",
        "shapes": "size mismatch",
        "names": "key(s) in state_dict",
    }
    assert words[killer] in said, said


def test_a_flipped_byte_of_a_shard_is_named(lively, tmp_path):
    prove_with(lively, tmp_path / "run", 2, 1)
    path = next((tmp_path / "run" / "cut").rglob("*.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(PlaitError, match="does not have the sha256"):
        parity.prove_converted(lively, tmp_path / "run" / "cut", tmp_path / "again.json")
    assert not (tmp_path / "again.json").exists()


def test_code_that_plait_did_not_write_is_not_run(maker, tmp_path):
    source = maker.solo()
    strange = tmp_path / "strange"
    strange.mkdir()
    for path in source.iterdir():
        (strange / path.name).write_bytes(path.read_bytes())
    with (strange / "modeling_solo.py").open("a") as file:
        file.write("\nopen('/tmp/plait-was-here', 'w')\n")
    (strange / "plait.json").unlink()
    files.write_manifest(strange, kind="hf_model", settings={}, facts=files.read_manifest(source)["facts"])
    with pytest.raises(ProofError, match="not plait's own code"):
        parity.prove_converted(strange, maker.shards(source, 1, 1), tmp_path / "parity.json")


def fails_on_rank_one():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("the second rank is unwell")


def test_a_failing_rank_ends_the_others_and_is_quoted():
    with pytest.raises(ProofError, match="the second rank is unwell"):
        run_ranks(fails_on_rank_one, Grid(2, 1))


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({}, False),
        ({"max_abs_diff": 2e-5}, True),
        ({"max_abs_diff": float("nan")}, True),
        ({"max_abs_diff_fp32": 1e-3}, True),
        ({"max_abs_diff_fp32": float("nan")}, True),
        ({"top1_equal": 9}, True),
    ],
)
def test_each_figure_of_a_comparison_decides(change, fails):
    row = {
        "case": "text", "positions": 10, "max_abs_logit": 10.0, "max_abs_diff": 1e-6,
        "max_abs_diff_fp32": 1e-5, "top1_equal": 10, "tolerance": 1e-5, "tolerance_fp32": 3e-4,
    }  # fmt: skip
    assert bool(logits.failures([row | change])) == fails
