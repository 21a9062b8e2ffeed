"""Reading a ``torch_dist`` checkpoint of Megatron Core, without processes and without Megatron.

``.metadata`` is a pickle: for every tensor its size and chunks, for every chunk the file, offset and
length of its bytes, which are a ``torch.save`` of that chunk. The pickle is read by an unpickler that
knows the few classes below and no others; chunks are read with ``weights_only=True``.

The layers of a model are one tensor whose first axis counts them, under names without a number; the next
axis counts experts.
Names are those of Transformer Engine's layers, also where Megatron's local layers were trained.
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.convert.tables import Entry, entries
from plait.errors import CheckpointError
from plait.models.specs import Spec
from plait.models.weights import Tensors

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

    def read(self, name: str, *at: int) -> Tensor:
        """A whole tensor, or what stands in it at a layer, or at a layer's expert, from its chunks.

        Raises:
            CheckpointError: an element stands in no chunk or in two, or a chunk is not what it should be.
        """
        entry = self.metadata.state_dict_metadata[name]
        size = entry.size[len(at) :]
        whole = torch.empty(size, dtype=entry.properties.dtype)
        times = torch.zeros(size, dtype=torch.uint8)
        for chunk in entry.chunks:
            place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            before, within = place[: len(at)], place[len(at) :]
            if all(one.start <= i < one.stop for one, i in zip(before, at, strict=True)):
                inside = tuple(i - one.start for one, i in zip(before, at, strict=True))
                whole[within] = self._chunk(name, chunk)[inside]
                times[within] += 1
        if not bool((times == 1).all()):
            raise CheckpointError(f"{self.folder}: elements of {name} are missing or stored twice")
        return whole

    def _chunk(self, name: str, chunk: Any) -> Tensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        info = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.folder / info.relative_path
        if path.name != info.relative_path or getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder}: {name} is stored in a way that plait does not read")
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                content = io.BytesIO(file.read(info.length))
            found: Tensor = torch.load(content, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{path}: a chunk of {name} cannot be read: {error}") from error
        if tuple(found.shape) != tuple(chunk.sizes):
            raise CheckpointError(
                f"{path}: a chunk of {name} is {tuple(found.shape)}, not {tuple(chunk.sizes)}"
            )
        return found


def read_iteration(folder: Path | str, spec: Spec) -> Mapping[str, Tensor]:
    """Megatron's whole tensors of an iteration, with the true vocabulary, by their local names.

    Raises:
        CheckpointError: a tensor of the model is missing, or one is there that the model has not.
    """
    stored = TorchDist(Path(folder))
    state = Tensors()
    used = set()
    for entry in entries(spec):
        name, at = _stored_name(stored, entry)
        used.add(name)
        state.add((entry.mcore,), lambda e=entry, n=name, i=at: _one(stored, e, n, i))  # type: ignore[misc]
    roots = {entry.mcore.partition(".")[0] for entry in entries(spec)} | {"vision_patch"}
    unknown = [n for n in stored.shapes if n not in used and n.partition(".")[0] in roots and EXTRA not in n]
    if unknown:
        raise CheckpointError(f"{folder} has {unknown[0]}, which a {spec.architecture} has not")
    return state


def _stored_name(stored: TorchDist, entry: Entry) -> tuple[str, tuple[int, ...]]:
    """The name of a parameter in a checkpoint, and its place in it where layers are stacked."""
    for name in entry.stacked:
        if name in stored.shapes:
            return name, entry.place_in_stack
    for name in (entry.row.engine.format(layer=entry.layer, expert=entry.expert), entry.mcore):
        if name in stored.shapes:
            return name, ()
    raise CheckpointError(f"{stored.folder} has no tensor {entry.stacked[0]}")


def _one(stored: TorchDist, entry: Entry, name: str, at: tuple[int, ...]) -> dict[str, Tensor]:
    return {entry.mcore: entry.row.op.join([stored.read(name, *at)], entry.shape)}
