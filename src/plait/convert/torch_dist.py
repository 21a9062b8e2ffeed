"""Reading a ``torch_dist`` checkpoint of Megatron Core, without processes and without Megatron.

``.metadata`` says for every tensor its size and chunks, and for every chunk the file, offset and length of
its bytes, which are a ``torch.save`` of that chunk. It is read by :mod:`plait.convert.metadata`; of a chunk
the tensor's place is read, see ``models/archive.py``.

The layers of a model are one tensor whose first axis counts them, under names without a number; the next
axis counts experts.
Names are those of Transformer Engine's layers, also where Megatron's local layers were trained.
"""

import math
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from plait.convert import metadata
from plait.convert.metadata import Chunk, Metadata
from plait.convert.ops import VOCAB, Held, Part, Piece, matrix
from plait.convert.stream import Placed, type_of
from plait.convert.tables import Entry, entries
from plait.errors import CheckpointError
from plait.files import write_json
from plait.layout import OPTIMIZER
from plait.models.archive import Archive, Room, append
from plait.models.specs import Spec
from plait.models.stored import Stored

METADATA, DATA, COMMON = ".metadata", "__0_{}.distcp", "common.pt"
STATE = "optimizer.state.{}."
"""What stands before a parameter's name in a state that the optimizer has of it, such as ``exp_avg``."""
NOTHING: Mapping[str, Any] = MappingProxyType({})
BACKENDS = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
"""What Megatron asks of a checkpoint before it reads it."""
EXTRA = "_extra_state"
"""Transformer Engine's own entries carry this in their names; nothing else may be ignored."""


@dataclass(frozen=True)
class TorchDist:
    """An iteration's folder."""

    folder: Path

    @cached_property
    def metadata(self) -> Metadata:
        """What it says of itself.

        Raises:
            CheckpointError: as :func:`plait.convert.metadata.read`.
        """
        return metadata.read(self.folder / METADATA)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: one.size for name, one in self.metadata.entries.items() if one.size is not None}

    def chunk(self, name: str, chunk: Chunk) -> Stored:
        """Where a chunk of a tensor stands.

        Raises:
            CheckpointError: it is not what the metadata say.
        """
        info = self.metadata.locations.get((name, chunk.offsets))
        if info is None:
            raise CheckpointError(f"{self.folder / METADATA} does not say where a chunk of {name} stands")
        path = self.folder / info.file
        if path.name != info.file or not info.is_plain:
            raise CheckpointError(f"{self.folder}: {name} is stored in a way that plait does not read")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {self.folder / METADATA} lists it for {name}")
        try:
            found = Archive(path, info.offset, info.length).content
        except CheckpointError as error:
            raise CheckpointError(f"a chunk of {name} in {error.args[0]}", hint=error.hint) from error
        if not isinstance(found, Stored) or found.shape != chunk.sizes:
            raise CheckpointError(
                f"{path}: a chunk of {name} is {getattr(found, 'shape', found)}, not {chunk.sizes}"
            )
        return found


def sources(
    folder: Path | str, spec: Spec, prefix: str = "", *, without: Collection[str] = ()
) -> list[Placed]:
    """Where the tensors of an iteration stand, and what they hold of the model.

    Args:
        folder: the iteration's folder.
        spec: the model.
        prefix: what stands before each parameter's name, see :data:`STATE`, with 0 in place of braces, or 1
            where it is an expert's; the weights have nothing.
        without: parts that have no such tensors.

    Raises:
        CheckpointError: a tensor of the model is missing, or one is there that the model has not.
    """
    stored = TorchDist(Path(folder))
    stacks: dict[str, dict[tuple[int, ...], Entry]] = {}
    for entry in (one for one in entries(spec) if one.part not in without):
        name, at = _stored_name(stored, entry, prefix)
        stacks.setdefault(name, {})[at] = entry
    roots = {entry.mcore.partition(".")[0] for entry in entries(spec)} | {"vision_patch"}
    below = tuple(f"{prefix.format(number)}{root}." for number in (0, 1) for root in roots)
    unknown = [n for n in stored.shapes if n not in stacks and n.startswith(below) and EXTRA not in n]
    if unknown:
        raise CheckpointError(f"{folder} has {unknown[0]}, which a {spec.architecture} has not")
    found = []
    for name, stack in stacks.items():
        _check_stack(folder, name, stored.shapes[name], stack, spec)
        chunks = stored.metadata.entries[name].chunks
        found += [Placed(name, stored.chunk(name, one), _held(stack, one, spec)) for one in chunks]
    return found


def lay_out(
    folder: Path,
    spec: Spec,
    dtypes: Mapping[str, Mapping[str, str]],
    common: Mapping[str, Any] = NOTHING,
    *,
    without: Collection[str] = (),
) -> dict[str, list[Placed]]:
    """Make the files of a checkpoint, with room for its tensors; where each of them stands, by prefix.

    It is what Megatron's trainer writes, with a chunk for each layer, and expert, of each parameter; any grid
    reads it. Each of the optimizer's states stands in a file of its own.

    Args:
        folder: the iteration's folder.
        spec: the model.
        dtypes: torch's names of the types, by Hugging Face's name, for each prefix: "" for the weights.
        common: what all ranks have alike and is no parameter's.
        without: parts that have weights only.
    """
    found: dict[str, list[Placed]] = {}
    written: list[_Written] = []
    for prefix, types in dtypes.items():
        there = (one for one in entries(spec) if not prefix or one.part not in without)
        chunks = [_one(entry, spec, prefix) for entry in there]
        name = DATA.format(sum(map(bool, found)))
        new = list(_make(folder / (f"{OPTIMIZER}{name}" if prefix else name), chunks, types))
        found[prefix] = [
            Placed(one.chunk.name, Archive(one.path, one.start, one.length).content, one.chunk.held)
            for one in new
        ]
        written += new
    _write_metadata(folder, written)
    torch.save(dict(common), folder / COMMON)
    write_json(folder / "metadata.json", BACKENDS)
    return found


def _make(path: Path, chunks: Sequence["_Chunk"], dtypes: Mapping[str, str]) -> Iterator["_Written"]:
    """Write a file of chunks."""
    with path.open("wb") as file:
        for chunk in chunks:
            room, start = Room(type_of(chunk.name, chunk.held.pieces, dtypes), chunk.sizes), file.tell()
            yield _Written(chunk, room.dtype, path, start, append(file, room, path))


def _check_stack(
    folder: Path | str,
    name: str,
    shape: tuple[int, ...],
    stack: Mapping[tuple[int, ...], Entry],
    spec: Spec,
) -> None:
    """A stack has as many layers and experts as the model, and each the shape that the config says.

    The vocabulary may have rows of padding.
    """
    at, entry = next(iter(stack.items()))
    one = entry.row.op.held(entry.hf, [spec.shapes[n] for n in entry.hf], entry.shape, Part()).shape
    depth = tuple(max(place[axis] for place in stack) + 1 for axis in range(len(at)))
    expected = (*depth, *one)
    same = (
        expected[1:] == shape[1:] and expected[0] <= shape[0] if entry.row.op == VOCAB else expected == shape
    )
    if not same:
        raise CheckpointError(f"{folder}: {name} has shape {shape}, its config says {expected}")


class _Chunk(NamedTuple):
    """A parameter of one layer, and of one expert, in the stack of all."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stack: tuple[int, ...]
    held: Held


class _Written(NamedTuple):
    """A chunk, and where it stands."""

    chunk: _Chunk
    dtype: str
    path: Path
    start: int
    length: int


def _one(entry: Entry, spec: Spec, prefix: str) -> _Chunk:
    whole = entry.row.op.held(entry.hf, [spec.shapes[name] for name in entry.hf], entry.shape, Part())
    at = entry.place_in_stack
    sizes = (*(1 for _ in at), *whole.shape)
    offsets = (*at, *(0 for _ in whole.shape))
    depth = (entry.layers, *([spec.num_experts] if entry.row.is_experts else ()))[: len(at)]
    held = replace(whole, shape=sizes, view=whole.matrix)
    name = prefix.format(int(entry.row.is_experts)) + _trained_name(entry)
    return _Chunk(name, offsets, sizes, (*depth, *whole.shape), held)


def _trained_name(entry: Entry) -> str:
    """The name that the trainer gives: Transformer Engine's, but for a vision tower, which keeps its own."""
    return entry.stacked[-1 if entry.row.place == "tower layer" else 0]


def _write_metadata(folder: Path, written: Sequence[_Written]) -> None:
    """Write what torch and Megatron read first."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    found: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for chunk, dtype, path, start, length in written:
        offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
        properties = TensorProperties(dtype=getattr(torch, dtype))
        entry = found.setdefault(chunk.name, TensorStorageMetadata(properties, torch.Size(chunk.stack), []))
        index = MetadataIndex(chunk.name, offsets, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        storage[index] = filesystem._StorageInfo(path.name, start, length)  # noqa: SLF001 - its reader's class
    with (folder / METADATA).open("wb") as file:
        pickle.dump(Metadata(found, storage_data=storage), file)


def _held(stack: Mapping[tuple[int, ...], Entry], chunk: Chunk, spec: Spec) -> Held:
    """What a chunk of a tensor holds, which may be several layers of one parameter."""
    depth = len(next(iter(stack)))
    offsets, sizes = chunk
    rows, cols = matrix(sizes[depth:])
    pieces: list[Piece] = []
    view = None
    layers = [range(o, o + n) for o, n in zip(offsets[:depth], sizes[:depth], strict=True)]
    for number, at in enumerate(product(*layers)):
        entry = stack[at]
        whole = entry.row.op.held(entry.hf, [spec.shapes[name] for name in entry.hf], entry.shape, Part())
        view = whole.view
        pieces += _of_box(whole, offsets[depth:], sizes[depth:], number * rows)
    return Held(sizes, tuple(pieces), view=view or (math.prod(sizes[:depth]) * rows, cols))


def _of_box(whole: Held, offsets: tuple[int, ...], sizes: tuple[int, ...], at_row: int) -> Iterator[Piece]:
    """What of a tensor's boxes lies in a chunk of it; only its first two axes are cut."""
    if whole.view:  # as it is: such a tensor is never cut
        yield from whole.pieces
        return
    rest = matrix(sizes)[1] // (sizes[1] if len(sizes) > 1 else 1)
    top, left = (*offsets, 0, 0)[0], (*offsets, 0, 0)[1] * rest
    rows, cols = matrix(sizes)
    for piece in whole.pieces:
        row, col = max(piece.at_row, top), max(piece.at_col, left)
        n_rows = min(piece.at_row + piece.rows, top + rows) - row
        n_cols = min(piece.at_col + piece.cols, left + cols) - col
        if n_rows > 0 and n_cols > 0:
            yield Piece(
                piece.hf,
                piece.row + row - piece.at_row,
                piece.col + col - piece.at_col,
                n_rows,
                n_cols,
                row - top + at_row,
                col - left,
            )


def _stored_name(stored: TorchDist, entry: Entry, prefix: str) -> tuple[str, tuple[int, ...]]:
    """The name of a parameter in a checkpoint, and its place in it where layers are stacked."""
    before = prefix.format(int(entry.row.is_experts))
    for name in entry.stacked:
        if before + name in stored.shapes:
            return before + name, entry.place_in_stack
    for name in (entry.row.engine.format(layer=entry.layer, expert=entry.expert), entry.mcore):
        if before + name in stored.shapes:
            return before + name, ()
    raise CheckpointError(
        f"{stored.folder} has no tensor {before}{entry.stacked[0]}",
        hint="only whole parts of a LLaVA model may be frozen" if prefix else "",
    )
