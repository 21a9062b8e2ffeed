"""Faults of a converter, and what of the proof finds each: ``make mutants`` prints the table.

Each fault changes the converter as a tired engineer might. A table of boxes is read in every direction, so a
round trip undoes most of them and the Merkle root agrees: something else must find them.
"""

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from makers import Maker, made

from plait.convert import checkpoint, folders, forms, ops, stream, tables
from plait.errors import PlaitError
from plait.models.specs import Spec
from plait.models.stored import write_from
from plait.parallel.grid import Grid
from plait.verify import parity

KILLERS = {
    "coverage": "coverage: ",
    "logits": "max abs difference",
    "merkle": "merkle root",
    "digests": "not what it was when it was made",
    "shapes": "size mismatch",
    "names": "key(s) in state_dict",
    "copies": "different copies",
    "stages": "Megatron looks there for",
    "types": "in it is",
}
"""The checks of a proof, and the words that each says."""


class Mutant(NamedTuple):
    """A fault: the model it is tried on, how the converter is changed, and the check that finds it."""

    model: str
    change: Callable[[pytest.MonkeyPatch], None]
    killer: str


MODELS = {
    "dense": lambda maker: maker.foreign("Mistral"),
    "tied": lambda maker: maker.foreign("Qwen2", tied=True),
    "experts": lambda maker: maker.mixtral("wide", initializer_range=0.2),
    "llava": lambda maker: maker.llava(
        "faulty", tower=maker.tower("clip-faulty", shake=True), base=maker.foreign("Mistral")
    ),
}
GRIDS = {"dense": Grid(2, 2), "tied": Grid(1, 2), "experts": Grid(1, 1), "llava": Grid(2, 1)}


# Operations that are wrong


class SwappedGateUp(ops.FuseGateUp):
    def held(self, names, shapes, sizes, part):
        return super().held(names[::-1], shapes[::-1], sizes, part)


class CutAsOne(ops.Op):
    """Tensors stacked one after the other, and then cut without regard to where they meet."""

    def held(self, names, shapes, sizes, part):
        rows = [(name, row) for name, shape in zip(names, shapes, strict=True) for row in range(shape[0])]
        share, cols = len(rows) // part.tp, shapes[0][1]
        mine = rows[part.rank * share : (part.rank + 1) * share]
        pieces = [ops.Piece(name, row, 0, 1, cols, at, 0) for at, (name, row) in enumerate(mine)]
        return ops.Held((share, cols), tuple(pieces))


class QKVByColumns(ops.FuseQKV):
    def held(self, names, shapes, sizes, part):
        whole = super().held(names, shapes, sizes, ops.Part())
        share = whole.shape[1] // part.tp
        pieces = tuple(piece._replace(col=part.rank * share, cols=share) for piece in whole.pieces)
        return ops.Held((whole.shape[0], share), pieces)


class MissingGroup(ops.FuseQKV):
    def held(self, names, shapes, sizes, part):
        straight = super().held(names, shapes, sizes, part)
        return dataclasses.replace(straight, pieces=straight.pieces[:-3])


class ReversedRanks(ops.RowWise):
    def held(self, names, shapes, sizes, part):
        return super().held(names, shapes, sizes, part._replace(rank=part.tp - 1 - part.rank))


class CopiedPadding(ops.Vocab):
    """Padding rows are copies of the last row, as two of the four systems had them."""

    def held(self, names, shapes, sizes, part):
        straight = super().held(names, shapes, sizes, part)
        (piece,) = straight.pieces
        last = piece.row + piece.rows - 1
        copies = (
            piece._replace(row=last, rows=1, at_row=row) for row in range(piece.rows, straight.shape[0])
        )
        return dataclasses.replace(straight, pieces=(piece, *copies) if piece.rows else (piece,))


class Turned(ops.Op):
    """Each row where the next one belongs."""

    def held(self, names, shapes, sizes, part):
        straight = super().held(names, shapes, sizes, part)
        rows, cols = straight.matrix
        pieces = [ops.Piece(names[0], row, 0, 1, cols, (row + 1) % rows, 0) for row in range(rows)]
        return dataclasses.replace(straight, pieces=tuple(pieces))


def row(name, of=("TABLES", "TOWERS"), **keys):
    """Give the rows whose Megatron name ends so another operation or other sources."""

    def swapped(rows):
        return tuple(dataclasses.replace(one, **keys) if one.mcore.endswith(name) else one for one in rows)

    def change(patch):
        changed = False
        for table in of:
            for kind, rows in getattr(tables, table).items():
                changed |= swapped(rows) != rows
                patch.setitem(getattr(tables, table), kind, swapped(rows))
        for table in ("PROJECTION", "PROJECTION_BIAS"):
            rows = getattr(tables, table)
            changed |= swapped(rows) != rows
            patch.setattr(tables, table, swapped(rows))
        assert changed, f"no row ends in {name}"

    return change


def without(table, name):
    """Leave rows out of a table."""

    def change(patch):
        found = getattr(tables, table)
        kept = {kind: tuple(one for one in rows if one.mcore != name) for kind, rows in found.items()}
        for kind, rows in kept.items():
            patch.setitem(found, kind, rows)

    return change


# Other places that are wrong


def turned_stage(patch):
    """Each layer of a stage holds its neighbour's weights."""
    straight = tables.Entry.local

    def turned(self, spec, grid, **experts):
        name = straight(self, spec, grid, **experts)
        layers = grid.layers(self.stage(spec, grid), num_layers=spec.num_layers)
        if self.row.place != "layer":
            return name
        return self.row.names(layer=(self.layer - layers.start + 1) % len(layers))[0]

    patch.setattr(tables.Entry, "local", turned)


def late_split(patch):
    """Stage 0 takes a layer more than its share."""
    straight = Grid.layers

    def late(self, stage, *, num_layers):
        found = straight(self, stage, num_layers=num_layers)
        shift = 1 if self.pp > 1 else 0
        return range(found.start + (shift if stage else 0), found.stop + (0 if stage else shift))

    patch.setattr(Grid, "layers", late)


def spec_with(**keys):
    """The config read wrong."""

    def change(patch):
        straight = Spec.from_config.__func__

        def changed(cls, config, **where):
            return dataclasses.replace(straight(cls, config, **where), **keys)

        patch.setattr(Spec, "from_config", classmethod(changed))

    return change


def no_tied_copy(patch):
    patch.setattr(tables, "TIED", tables.TIED[:1])


def norms_in_bf16(patch):
    straight = checkpoint.type_of

    def halved(name, pieces, dtypes):
        return "bfloat16" if "layernorm" in name else straight(name, pieces, dtypes)

    patch.setattr(checkpoint, "type_of", halved)


def dropped_expert(patch):
    straight = tables.parts

    def fewer(spec):
        for part in straight(spec):
            yield dataclasses.replace(part, experts=max(0, part.experts - 1))

    patch.setattr(tables, "parts", fewer)


def turned_experts(patch):
    """Each expert in the place of the next."""
    straight = tables.Entry.local

    def turned(self, spec, grid, **experts):
        if self.row.is_experts:
            self = dataclasses.replace(self, expert=(self.expert + 1) % spec.num_experts)
        return straight(self, spec, grid, **experts)

    patch.setattr(tables.Entry, "local", turned)


def lost_block(patch):
    """The end of what is written is left out once."""
    done = []

    def short(fd, offset, content):
        done.append(None)
        write_from(fd, offset, content[: len(content) // 2] if len(done) == 5 else content)

    patch.setattr(stream, "write_from", short)


def one_copy_changed(patch):
    """The second rank's copies of norms have another byte."""

    def changed(fd, offset, content):
        content = bytearray(content)
        if len(content) == 32 * 4:
            changed.seen += 1
            content[0] ^= changed.seen % 2
        write_from(fd, offset, memoryview(content))

    changed.seen = 0
    patch.setattr(stream, "write_from", changed)


def exchanged_ranks(patch):
    """Each tensor rank's file under the other's name."""
    straight = forms.of_grid

    def exchanged(spec, grid, **keys):
        found = straight(spec, grid, **keys)
        turned = {place: place._replace(tp=(place.tp + 1) % grid.tp) for place in found}
        return {turned[place]: held for place, held in found.items()}

    patch.setattr(forms, "of_grid", exchanged)


HF = "model.layers.{layer}."
SEEN = "encoder.layers.{layer}."
MUTANTS = {
    "gate and up swapped": Mutant("dense", row("linear_fc1.weight", op=SwappedGateUp()), "logits"),
    "gate and up cut as one": Mutant("dense", row("linear_fc1.weight", op=CutAsOne()), "logits"),
    "qkv stacked, not interleaved": Mutant("dense", row("linear_qkv.weight", op=CutAsOne()), "logits"),
    "qkv by heads, not groups": Mutant("dense", row("linear_qkv.weight", op=ops.QKVByHeads()), "logits"),
    "rotary rows in pairs": Mutant("dense", row("linear_qkv.weight", op=ops.PairedQKV()), "logits"),
    "a group of qkv missing": Mutant("dense", row("linear_qkv.weight", op=MissingGroup()), "coverage"),
    "column for row": Mutant("dense", row("linear_qkv.weight", op=QKVByColumns()), "shapes"),
    "row for column": Mutant("dense", row("linear_proj.weight", op=ops.COLUMN), "shapes"),
    "ranks in reverse": Mutant("dense", row("linear_fc2.weight", op=ReversedRanks()), "logits"),
    "rank files exchanged": Mutant("dense", exchanged_ranks, "merkle"),
    "layers of a stage turned": Mutant("dense", turned_stage, "logits"),
    "pipeline split off by one": Mutant("dense", late_split, "stages"),
    "head missing": Mutant("dense", without("TABLES", "output_layer.weight"), "coverage"),
    "head read from the embedding": Mutant(
        "dense", row("output_layer.weight", hf=("model.embed_tokens.weight",)), "coverage"
    ),
    "padding rows copied": Mutant("dense", row("word_embeddings.weight", op=CopiedPadding()), "coverage"),
    "wrong rope base": Mutant("dense", spec_with(rope_theta=1e6), "logits"),
    "wrong norm epsilon": Mutant("dense", spec_with(rms_norm_eps=1e-2), "logits"),
    "a norm read twice": Mutant(
        "dense", row("pre_mlp_layernorm.weight", hf=(HF + "input_layernorm.weight",)), "coverage"
    ),
    "norms in bf16": Mutant("dense", norms_in_bf16, "types"),
    "half a block not written": Mutant("dense", lost_block, "digests"),
    "tied head not copied": Mutant("tied", no_tied_copy, "names"),
    "biases of qkv by heads": Mutant("tied", row("linear_qkv.bias", op=ops.QKVByHeads()), "logits"),
    "experts turned": Mutant("experts", turned_experts, "logits"),
    "an expert dropped": Mutant("experts", dropped_expert, "coverage"),
    "w1 and w3 swapped": Mutant("experts", row("}.linear_fc1.weight", op=SwappedGateUp()), "logits"),
    "tower's qkv stacked": Mutant("llava", row("linear_qkv.weight", of=["TOWERS"], op=CutAsOne()), "logits"),
    "tower's fc2 cut by rows": Mutant(
        "llava", row("mlp.linear_fc2.weight", of=["TOWERS"], op=ops.COLUMN), "shapes"
    ),
    "tower's norms exchanged": Mutant(
        "llava", row("input_layernorm.bias", hf=(SEEN + "layer_norm2.bias",)), "coverage"
    ),
    "position rows off by one": Mutant("llava", row("position_embeddings.weight", op=Turned()), "logits"),
    "projector's fc1 whole": Mutant("llava", row("encoder.linear_fc1.weight", op=ops.WHOLE), "shapes"),
    "projector's layers exchanged": Mutant(
        "llava", row("encoder.linear_fc1.weight", hf=("linear_2.weight",)), "coverage"
    ),
}


def prove(source, root, grid):
    """Convert, cut and prove with whatever the converter is now."""
    root.mkdir()
    whole = made(root / "whole", "megatron", lambda f: folders.convert(source, f))
    cut = made(root / "cut", "sharded", lambda f: folders.shard(whole, f, grid))
    parity.prove_converted(source, cut, root / "parity.json")


@contextmanager
def mutated(mutant):
    """The converter with the fault."""
    with pytest.MonkeyPatch.context() as patch:
        mutant.change(patch)
        yield


def killed(name, source, root):
    """What the proof said of a fault; "" if it passed."""
    try:
        with mutated(MUTANTS[name]):
            prove(source, root, GRIDS[MUTANTS[name].model])
    except PlaitError as error:
        return str(error)
    return ""


def main():
    """Print the table; status 1 if a fault lives."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        maker, alive = Maker(root / "models"), 0
        print(f"{'fault':32}{'model':10}{'found by':10}what it said")  # noqa: T201
        for number, (name, mutant) in enumerate(MUTANTS.items()):
            said = killed(name, MODELS[mutant.model](maker), root / str(number))
            found = KILLERS[mutant.killer] in said
            alive += not found
            words = said.partition("\n")[0].replace(str(root), "")[:100]
            print(f"{name:32}{mutant.model:10}{mutant.killer if found else 'NOTHING':10}{words}")  # noqa: T201
            shutil.rmtree(root / str(number), ignore_errors=True)
        print(f"{len(MUTANTS) - alive} of {len(MUTANTS)} faults are found")  # noqa: T201
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
