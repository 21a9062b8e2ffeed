"""Files of ``torch.save``, read and laid out without their tensors; nothing that they ask for is run.

Such a file is a zip archive: ``data.pkl`` is a pickle of the object, whose tensors are numbers of records,
and each record holds the bytes of one storage. The pickle is read by an unpickler that makes plain
containers, ``argparse.Namespace`` and :class:`Stored`; an object of any other class becomes :class:`Inert`.
"""

import argparse
import collections
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from plait.errors import CheckpointError
from plait.models.stored import SIZES, Stored

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
PICKLE, LIMIT = "data.pkl", 1 << 28
REFUSED = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4"}
"""What no file of torch has in its pickle."""
HEADER = struct.Struct("<4s22xHH")
"""A record's header: its mark, and the lengths of the name and of what stands between that and the bytes."""
BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OverflowError, MemoryError, RecursionError, NotImplementedError,
    RuntimeError, zlib.error,
)  # fmt: skip
"""What changed bytes make of a pickle or of an archive."""


def check_pickle(text: bytes) -> None:
    """Refuse a pickle that asks for more memory than it has bytes, before it is read.

    Raises:
        UnpicklingError: it does.
        ValueError: it is cut off, or holds what is no instruction.
    """
    for instruction, argument, place in pickletools.genops(text):
        name = instruction.name
        if name in REFUSED or (name.endswith("PUT") and int(argument or 0) > len(text)):
            raise pickle.UnpicklingError(f"{name} at byte {place} has no place in a checkpoint")


class Inert:
    """Stands for an object of a class that has no place here: nothing of that class is loaded or run."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Take whatever the object would be made from, and leave it."""
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Leave its state too."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Leave what it would hold."""

    def append(self, value: Any) -> None:
        """Leave what it would hold."""

    def extend(self, values: Any) -> None:
        """Leave what it would hold."""


class _Record(NamedTuple):
    """A storage: its type, its place in the file, its bytes."""

    dtype: str
    offset: int
    size: int


class Archive:
    """A file of ``torch.save``, or such a file within another."""

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        """Take the place of the archive; nothing is read yet."""
        self.path, self.start = path, start
        self.length = path.stat().st_size - start if length is None else length

    @cached_property
    def content(self) -> Any:
        """The object, with :class:`Stored` for each tensor.

        Raises:
            CheckpointError: the file is no whole archive, or a tensor does not lie in it.
        """
        try:
            with self.path.open("rb") as file, zipfile.ZipFile(_Window(file, self)) as archive:
                found = archive.infolist()
                names = {info.filename.partition("/")[2]: info for info in found}
                if len(names) != len(found):
                    raise ValueError("a record stands twice")
                if names[PICKLE].file_size > LIMIT:
                    raise ValueError(f"{PICKLE} has {names[PICKLE].file_size} bytes")
                self._offset(file.fileno(), names[PICKLE])
                text = archive.read(names[PICKLE])
                if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
                    raise ValueError("its numbers are big-endian")
                check_pickle(text)
                records = {
                    name.removeprefix("data/"): (self._offset(file.fileno(), info), info.file_size)
                    for name, info in names.items()
                    if name.startswith("data/")
                }
            return _Unpickler(text, self.path, records).load()
        except BROKEN as error:
            words = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{self.path} cannot be read as a checkpoint: {words}",
                hint="it is cut off or damaged, or not of torch.save since PyTorch 1.6: copy or save it anew",
            ) from error

    def _offset(self, fd: int, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin in the file."""
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is compressed or encrypted")
        place = self.start + info.header_offset
        if place < self.start:
            raise ValueError(f"{info.filename} does not lie in the file")
        mark, name, extra = HEADER.unpack(os.pread(fd, HEADER.size, place))
        offset: int = place + HEADER.size + name + extra
        if mark != b"PK\x03\x04" or offset + info.file_size > self.start + self.length:
            raise ValueError(f"{info.filename} does not lie in the file")
        return offset


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, archive: Archive) -> None:
        self._file, self._archive, self._at = file, archive, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._archive.length}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file's beginning")
        self._at = base + offset
        return self._at

    def readinto(self, room: Any) -> int:
        count = max(0, min(len(room), self._archive.length - self._at))
        found = os.pread(self._file.fileno(), count, self._archive.start + self._at)
        room[: len(found)] = found
        self._at += len(found)
        return len(found)


class _Unpickler(pickle.Unpickler):
    """Makes plain containers, arguments and the places of tensors, and calls nothing else."""

    def __init__(self, text: bytes, path: Path, records: dict[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(text))
        self._path, self._records = path, records

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in SIZES:
            return f"torch.{name}"
        if module == "torch.storage" and name == "UntypedStorage":
            return STORAGES[name]
        made = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): type("Namespace", (argparse.Namespace,), {}),
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
            ("torch._tensor", "_rebuild_from_type_v2"): self._with_attributes,
        }
        return made.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> _Record:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or dtype not in SIZES:
            raise pickle.UnpicklingError(f"{kind!r} of {dtype!r} is no storage")
        return _Record(dtype, *self._records[key])

    def _tensor(self, record: _Record, first: int, shape: Any, stride: Any, *_: Any) -> Stored:
        return self._placed(record, record.dtype, first, tuple(shape), tuple(stride))

    def _with_attributes(self, make: Any, _kind: Any, arguments: Any, _attributes: Any) -> Stored:
        """A tensor that Python attributes were set on, as Megatron does to an optimizer's masters."""
        if make not in (self._tensor, self._typed):
            raise pickle.UnpicklingError("a tensor that is made by no function for it")
        tensor: Stored = make(*arguments)
        return tensor

    def _typed(
        self,
        record: _Record,
        first: int,
        shape: Any,
        stride: Any,
        _grad: Any,
        _hooks: Any,
        dtype: str,
        *_: Any,
    ) -> Stored:
        return self._placed(record, dtype.removeprefix("torch."), first, tuple(shape), tuple(stride))

    def _placed(
        self, record: _Record, dtype: str, first: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> Stored:
        numbers = (first, *shape, *stride)
        if dtype not in SIZES or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError(f"a tensor of {dtype} and shape {shape}")
        stored = Stored(self._path, record.offset + first * SIZES[dtype], dtype, shape)
        if stored.offset + stored.nbytes > record.offset + record.size:
            raise pickle.UnpicklingError(f"a tensor of shape {shape} does not lie in its record")
        return stored if _by_rows(shape, stride) else Strided(self._path, stored.offset, dtype, shape)


class Strided(Stored):
    """A tensor whose elements do not stand row by row; it is refused where it is used."""


def _by_rows(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements stand one after the other, in the order of their indices."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


# Writing


class Room(NamedTuple):
    """A tensor whose bytes are written later: its type and shape."""

    dtype: str
    shape: tuple[int, ...]


class _Storage(NamedTuple):
    """A tensor's record."""

    key: str
    room: Room


ALIGNED = 64
"""Where a record's bytes begin, as torch has it."""
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATE64 = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_FULL = 0xFFFFFFFF
"""Stands in a field of four bytes for a number that the entry has in eight, elsewhere."""


def lay_out(path: Path, content: Any) -> None:
    """Write a file of ``torch.save`` with holes where tensors are due; :class:`Archive` says where.

    Args:
        path: the file.
        content: plain containers and :class:`Room` in place of tensors.

    Raises:
        CheckpointError: a tensor is of a type that has no storage of its own.
    """
    with path.open("wb") as file:
        append(file, content, path)


def append(file: io.BufferedWriter, content: Any, path: Path) -> int:
    """Write the same behind what a file has already; its bytes.

    Raises:
        CheckpointError: as :func:`lay_out`.
    """
    base = file.tell()
    text, rooms = _pickled(content, path)
    fixed = {PICKLE: text, "byteorder": b"little", "version": b"3\n"}
    records: list[tuple[str, bytes, int]] = [(name, data, len(data)) for name, data in fixed.items()]
    records += [(f"data/{n}", b"", Stored(path, 0, *room).nbytes) for n, room in enumerate(rooms)]
    central = [_record(file, base, f"archive/{name}", data, size) for name, data, size in records]
    start = file.tell() - base
    file.write(b"".join(central))
    end = file.tell() - base
    size, count = end - start, len(central)
    file.write(_END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, size, start))
    file.write(_LOCATE64.pack(b"PK\x06\x07", 0, end, 1))
    few, short, low = min(count, 0xFFFF), min(size, _FULL), min(start, _FULL)
    file.write(_END.pack(b"PK\x05\x06", 0, 0, few, few, short, low, 0))
    return file.tell() - base


def _pickled(content: Any, path: Path) -> tuple[bytes, list[Room]]:
    """The pickle of an object, and its tensors by the number of their record."""
    import torch

    names = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
    rooms: list[Room] = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, one: Any) -> Any:
            if not isinstance(one, Room):
                return NotImplemented
            rooms.append(one)
            stride = [math.prod(one.shape[axis + 1 :]) for axis in range(len(one.shape))]
            storage = _Storage(str(len(rooms) - 1), one)
            about: Any = (storage, 0, one.shape, tuple(stride), False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, about  # noqa: SLF001 - the name that torch's own files have

        def persistent_id(self, one: Any) -> Any:
            if not isinstance(one, _Storage):
                return None
            if one.room.dtype not in names:
                raise CheckpointError(f"{path} cannot hold tensors of {one.room.dtype}")
            kind = getattr(torch, names[one.room.dtype])
            return "storage", kind, one.key, "cpu", math.prod(one.room.shape)

    room = io.BytesIO()
    Pickler(room, protocol=2).dump(content)
    return room.getvalue(), rooms


def _record(file: io.BufferedWriter, base: int, name: str, data: bytes, size: int) -> bytes:
    """Write a record of the archive from ``base`` on, or leave a hole of its size; its directory's entry."""
    text, place = name.encode(), file.tell() - base
    wide = size >= _FULL
    extra = struct.pack("<2H2Q", 1, 16, size, size) if wide else b""
    bare = place + _LOCAL.size + len(text) + len(extra) + 4
    extra += struct.pack("<2H", 0x4246, -bare % ALIGNED) + bytes(-bare % ALIGNED)  # torch's mark of padding
    crc, short = zlib.crc32(data), _FULL if wide else size
    file.write(_LOCAL.pack(b"PK\x03\x04", 45, 0x800, 0, 0, 0, crc, short, short, len(text), len(extra)))
    file.write(text + extra + data)
    file.seek(base + place + _LOCAL.size + len(text) + len(extra) + size)
    far = struct.pack("<2H3Q", 1, 24, size, size, place)
    head = (b"PK\x01\x02", 45, 45, 0x800, 0, 0, 0, crc, _FULL, _FULL, len(text), len(far), 0, 0, 0, 0, _FULL)
    return _CENTRAL.pack(*head) + text + far
