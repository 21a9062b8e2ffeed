"""What a ``torch_dist`` checkpoint says of itself in ``.metadata``, which is a pickle from who knows whom.

It has for every tensor its size and chunks, and for every chunk the file, offset and length of its bytes. The
unpickler knows the names of the few classes below and loads none of them: an object's state is only kept, and
becomes the plain rows of :class:`Metadata` once each number of it is checked.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from plait.errors import CheckpointError
from plait.models.archive import BROKEN, Inert, check_pickle

Numbers = tuple[int, ...]
T = TypeVar("T")


class Chunk(NamedTuple):
    """A box of a tensor."""

    offsets: Numbers
    sizes: Numbers


class Entry(NamedTuple):
    """A tensor, by its chunks; what is none has no size and no chunks."""

    size: Numbers | None
    chunks: tuple[Chunk, ...] = ()


class Location(NamedTuple):
    """Bytes of a file, as they are or transformed by something."""

    file: str
    offset: int
    length: int
    is_plain: bool


class Metadata(NamedTuple):
    """Everything that is stored by name; where chunks stand, by name and offsets."""

    entries: Mapping[str, Entry]
    locations: Mapping[tuple[str, Numbers | None], Location]


class _Said:
    """An object of a class that is not loaded: what the pickle says of it."""

    said: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        self.said = state if type(state) is dict else {}


class _Metadata(_Said):
    pass


class _Tensor(_Said):
    pass


class _Bytes(_Said):
    pass


class _Chunk(_Said):
    pass


class _Index(_Said):
    pass


class _Location(_Said):
    pass


_CHECKPOINT = "torch.distributed.checkpoint"
_TYPES = ("float32", "float16", "bfloat16", "float64", "uint8", "int32", "int64")
STAND_INS: Mapping[str, Mapping[str, type]] = {
    "torch": {"Size": tuple, **dict.fromkeys(_TYPES, Inert)},
    "torch.serialization": {"_get_layout": Inert},
    "collections": {"OrderedDict": dict},
    "builtins": {"getattr": Inert},  # Python 3.11.0 to 3.11.3 pickle the member of an enum by it
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo": _Location},
    f"{_CHECKPOINT}.planner": dict.fromkeys(
        ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"), Inert
    ),
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata": _Bytes,
        "ChunkStorageMetadata": _Chunk,
        "Metadata": _Metadata,
        "MetadataIndex": _Index,
        "TensorStorageMetadata": _Tensor,
        **dict.fromkeys(("StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"), Inert),
    },
}
"""What stands for each name that a checkpoint's metadata have; no code of torch does."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in STAND_INS.get(module, {}):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return STAND_INS[module][name]


def read(path: Path) -> Metadata:
    """Read a checkpoint's metadata.

    Raises:
        CheckpointError: there are none, or they hold something that they should not; the tensor is named.
    """
    try:
        text = path.read_bytes()
        check_pickle(text)
        found = _as(_Metadata, _Unpickler(io.BytesIO(text)).load(), "it").said
        entries, places = (
            _as(dict, found.get(key), f"its {key}") for key in ("state_dict_metadata", "storage_data")
        )
        return Metadata(
            {_as(str, name, "a name"): _entry(name, one) for name, one in entries.items()},
            dict(_locations(places)),
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {path.parent} is no torch_dist checkpoint") from error
    except BROKEN as error:
        words = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {words}") from error


def _entry(name: str, found: Any) -> Entry:
    """Check a tensor: its chunks lie in it."""
    if isinstance(found, _Bytes):
        return Entry(None)
    said = _as(_Tensor, found, name).said
    size = _numbers(said.get("size"), f"the size of {name}")
    chunks = []
    for one in _as(list, said.get("chunks"), f"the chunks of {name}"):
        box = _as(_Chunk, one, f"a chunk of {name}").said
        chunk = Chunk(*(_numbers(box.get(key), f"the {key} of a chunk of {name}") for key in Chunk._fields))
        if not len(size) == len(chunk.offsets) == len(chunk.sizes) or any(
            offset + length > whole for offset, length, whole in zip(*chunk, size, strict=True)
        ):
            raise ValueError(f"a chunk of {name} does not lie in its {list(size)}")
        chunks.append(chunk)
    return Entry(size, tuple(chunks))


def _locations(found: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, Numbers | None], Location]]:
    """Check where chunks stand."""
    for index, one in found.items():
        key = _as(_Index, index, "a key of its storage_data").said
        name = _as(str, key.get("fqn"), "the name of a chunk")
        offsets, place = key.get("offset"), _as(_Location, one, f"the place of {name}").said
        start, length = _numbers((place.get("offset"), place.get("length")), f"the place of {name}")
        yield (
            (name, None if offsets is None else _numbers(offsets, f"the offsets of {name}")),
            Location(
                _as(str, place.get("relative_path"), f"the file of {name}"),
                start,
                length,
                is_plain=not place.get("transform_descriptors"),
            ),
        )


def _as(kind: type[T], found: Any, what: str) -> T:
    if not isinstance(found, kind):
        raise TypeError(f"{what} is no {kind.__name__.strip('_').lower()} of a checkpoint")
    return found


def _numbers(found: Any, what: str) -> Numbers:
    if type(found) is not tuple or not all(type(one) is int and one >= 0 for one in found):
        raise ValueError(f"{what} is no row of sizes")
    return found
