"""Reading a ``torch_dist`` checkpoint of Megatron Core, without processes and without Megatron.

``.metadata`` is a pickle: for every tensor its size and chunks, for every chunk the file, offset and
length of its bytes, which are a ``torch.save`` of that chunk. The pickle is read by an unpickler that
knows the few classes below and no others; of a chunk the tensor's place is read, see ``models/archive.py``.

The layers of a model are one tensor whose first axis counts them, under names without a number; the next
axis counts experts.
Names are those of Transformer Engine's layers, also where Megatron's local layers were trained.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.convert.ops import Held, Part, Piece, matrix
from plait.convert.stream import Placed
from plait.convert.tables import Entry, entries
from plait.errors import CheckpointError
from plait.models.archive import Archive
from plait.models.specs import Spec
from plait.models.stored import Stored

METADATA = ".metadata"
EXTRA = "_extra_state"
"""Transformer Engine's own entries carry this in their names; nothing else may be ignored."""

_CHECKPOINT = "torch.distributed.checkpoint"
ALLOWED: dict[str, frozenset[str]] = {
    "torch": frozenset({"Size", "float32", "float16", "bfloat16", "float64", "uint8", "int32", "int64"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    f"{_CHECKPOINT}.filesystem": frozenset({"_StorageInfo"}),
    f"{_CHECKPOINT}.planner": frozenset({"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}),
    f"{_CHECKPOINT}.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in ALLOWED.get(module, frozenset()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Enum:
    """Stand for ``getattr``, with which Python 3.11.0 to 3.11.3 pickle the member of an enum."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"getattr of {name!r} has no place in a checkpoint's metadata")
    return kind[name]


@dataclass(frozen=True)
class TorchDist:
    """An iteration's folder."""

    folder: Path

    @cached_property
    def metadata(self) -> Any:
        """Torch's ``Metadata`` of the checkpoint.

        Raises:
            CheckpointError: there is none, or it holds something that it should not.
        """
        path = self.folder / METADATA
        try:
            with path.open("rb") as file:
                return _Unpickler(file).load()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: {self.folder} is no torch_dist checkpoint") from error
        except (pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        found = self.metadata.state_dict_metadata
        return {name: tuple(entry.size) for name, entry in found.items() if hasattr(entry, "chunks")}

    def chunk(self, name: str, chunk: Any) -> Stored:
        """Where a chunk of a tensor stands.

        Raises:
            CheckpointError: it is not what the metadata say.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex

        info = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.folder / info.relative_path
        if path.name != info.relative_path or getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder}: {name} is stored in a way that plait does not read")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {self.folder / METADATA} lists it")
        try:
            found = Archive(path, info.offset, info.length).content
        except CheckpointError as error:
            raise CheckpointError(f"a chunk of {name} in {error}", hint=error.hint) from error
        if not isinstance(found, Stored) or found.shape != tuple(chunk.sizes):
            raise CheckpointError(
                f"{path}: a chunk of {name} is {getattr(found, 'shape', found)}, not {tuple(chunk.sizes)}"
            )
        return found


def sources(folder: Path | str, spec: Spec) -> list[Placed]:
    """Where the tensors of an iteration stand, and what they hold of the model.

    Raises:
        CheckpointError: a tensor of the model is missing, or one is there that the model has not.
    """
    stored = TorchDist(Path(folder))
    stacks: dict[str, list[tuple[Entry, tuple[int, ...]]]] = {}
    for entry in entries(spec):
        name, at = _stored_name(stored, entry)
        stacks.setdefault(name, []).append((entry, at))
    roots = {entry.mcore.partition(".")[0] for entry in entries(spec)} | {"vision_patch"}
    unknown = [
        n for n in stored.shapes if n not in stacks and n.partition(".")[0] in roots and EXTRA not in n
    ]
    if unknown:
        raise CheckpointError(f"{folder} has {unknown[0]}, which a {spec.architecture} has not")
    found = []
    for name, stack in stacks.items():
        chunks = stored.metadata.state_dict_metadata[name].chunks
        found += [Placed(name, stored.chunk(name, one), _held(stack, one, spec)) for one in chunks]
    return found


def _held(stack: list[tuple[Entry, tuple[int, ...]]], chunk: Any, spec: Spec) -> Held:
    """What a chunk of a tensor holds, which may be several layers of one parameter."""
    depth = len(stack[0][1])
    sizes, offsets = tuple(chunk.sizes), tuple(chunk.offsets)
    rows, _ = matrix(sizes[depth:])
    pieces: list[Piece] = []
    view = None
    for entry, at in stack:
        inside = [i - offset for i, offset in zip(at, offsets, strict=False)]
        if not all(0 <= i < size for i, size in zip(inside, sizes, strict=False)):
            continue
        number = 0
        for i, size in zip(inside, sizes, strict=False):
            number = number * size + i
        whole = entry.row.op.held(entry.hf, [spec.shapes[name] for name in entry.hf], entry.shape, Part())
        view = whole.view
        pieces += _of_box(whole, offsets[depth:], sizes[depth:], number * rows)
    depths = matrix(sizes[:depth])[0] * matrix(sizes[:depth])[1]
    return Held(sizes, tuple(pieces), view=view or (depths * rows, matrix(sizes[depth:])[1]))


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


def _stored_name(stored: TorchDist, entry: Entry) -> tuple[str, tuple[int, ...]]:
    """The name of a parameter in a checkpoint, and its place in it where layers are stacked."""
    for name in entry.stacked:
        if name in stored.shapes:
            return name, entry.place_in_stack
    for name in (entry.row.engine.format(layer=entry.layer, expert=entry.expert), entry.mcore):
        if name in stored.shapes:
            return name, ()
    raise CheckpointError(f"{stored.folder} has no tensor {entry.stacked[0]}")
