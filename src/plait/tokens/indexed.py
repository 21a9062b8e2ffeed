r"""Megatron's indexed dataset: arrays in ``.bin``, where each begins in ``.idx``. Little-endian.

===========  ======  ==================================================================
offset       bytes   what
===========  ======  ==================================================================
0            9       magic ``MMIDIDX\0\0``
9            8       version, always 1 (unsigned)
17           1       dtype code: 1 uint8, 4 int32, 8 uint16, ... (``CODES``)
18           8       S, number of items (Megatron: sequences)
26           8       D, number of document bounds: documents + 1
34           4 * S   length of each item, in elements (int32)
34 + 4S      8 * S   where each item begins in ``.bin``, in bytes (int64)
34 + 12S     8 * D   first item of each document, and S at the end (int64)
===========  ======  ==================================================================

An indexed shard is a folder of such pairs and a manifest. Item i is pack i, but for pictures' files::

    data-text                  uint16, or int32 from 65,500 tokens on: token ids
    data-role                  uint16: who speaks (``plait.tokens.roles``)
    data-vision_patch_indices  int32: index into the pack's patches, -1 where a token has none
    data-image                 uint8: one item a picture = its file; one document a pack, maybe empty
    data-vision_patch          instead of data-image: uint16 = fp16 bits of the pack's patches
    data-lineage               int64: where the pack's documents come from (``plait.tokens.lineage``)

>>> index_size(items=35_000, documents=35_000)
700042
"""

import mmap
import os
import struct
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import DTypeLike, NDArray

from plait.errors import DataError
from plait.files import read_manifest

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
CODES: dict[str, int] = {
    "uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8,
}  # fmt: skip
NAMES = {code: name for name, code in CODES.items()}
LARGEST_UINT16_VOCABULARY = 65_499
BUFFER = 1 << 20
"""Bytes that are written at once."""
STRETCH = 1 << 17
"""Elements that are read at once."""

TEXT, ROLE, INDICES, IMAGE, PATCHES = (
    "data-text", "data-role", "data-vision_patch_indices", "data-image", "data-vision_patch",
)  # fmt: skip


def index_size(*, items: int, documents: int) -> int:
    """Bytes of an ``.idx`` file."""
    return len(MAGIC) + HEADER.size + 12 * items + 8 * (documents + 1)


def text_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of token ids: two bytes where the vocabulary allows."""
    return np.dtype(np.uint16 if vocab_size <= LARGEST_UINT16_VOCABULARY else np.int32)


class IndexedWriter:
    """Writes ``prefix.bin`` item by item, and ``prefix.idx`` when it is closed without an error."""

    def __init__(self, prefix: Path, dtype: DTypeLike) -> None:
        """Start both files.

        Args:
            prefix: path of the pair without ``.bin`` and ``.idx``.
            dtype: type of every element; values are not checked to fit.
        """
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._sizes, self._bounds = array("i"), array("q", [0])
        self._bin = _with(prefix, ".bin").open("wb", BUFFER)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        if kind is None:
            self._write_index()

    def item(self, values: NDArray[Any] | bytes) -> None:
        """Append an item to the open document."""
        flat = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else values.ravel()
        self._bin.write(np.ascontiguousarray(flat, self.dtype).data)
        self._sizes.append(flat.size)

    def end_document(self) -> None:
        """Close the open document, which may be empty."""
        self._bounds.append(len(self._sizes))

    def document(self, *items: NDArray[Any] | bytes) -> None:
        """Append a document of these items."""
        for values in items:
            self.item(values)
        self.end_document()

    def documents(self, values: NDArray[Any], sizes: NDArray[np.int64]) -> None:
        """Append documents of one item each: items of these sizes stand end to end in ``values`` (n,)."""
        self._bin.write(np.ascontiguousarray(values, self.dtype).data)
        self._bounds.extend(range(len(self._sizes) + 1, len(self._sizes) + len(sizes) + 1))
        self._sizes.frombytes(sizes.astype(np.int32).tobytes())

    def _write_index(self) -> None:
        sizes = np.asarray(self._sizes, "<i4")
        starts = np.zeros(len(sizes), "<i8")
        np.cumsum(sizes[:-1], out=starts[1:])
        starts *= self.dtype.itemsize
        with _with(self.prefix, ".idx").open("wb") as out:
            out.write(MAGIC + HEADER.pack(1, CODES[self.dtype.name], len(sizes), len(self._bounds)))
            for column in (sizes, starts, np.asarray(self._bounds, "<i8")):
                out.write(column.data)


class IndexedReader:
    """Reads a pair; the index is mapped, items are read: mapped ones would stay in memory."""

    def __init__(self, prefix: Path, names: Mapping[int, str] = NAMES) -> None:
        """Open both files.

        Args:
            prefix: path of the pair without ``.bin`` and ``.idx``.
            names: types by their codes, where another program than Megatron Core wrote them.

        Raises:
            DataError: a file is missing, is not of this format, or has another size than its index.
        """
        index = _mapped(_with(prefix, ".idx"))
        if bytes(index[:9]) != MAGIC or len(index) < len(MAGIC) + HEADER.size:
            raise DataError(f"{prefix}.idx is not an index of Megatron's indexed dataset")
        version, code, items, bounds = HEADER.unpack_from(index, len(MAGIC))
        if version != 1 or code not in names or len(index) != index_size(items=items, documents=bounds - 1):
            raise DataError(
                f"{prefix}.idx has version {version}, dtype code {code} and {len(index)} bytes; "
                f"expected version 1, a code of {sorted(names)} and 34 + 12 * {items} + 8 * {bounds} bytes"
            )
        self.dtype = np.dtype(names[code]).newbyteorder("<")
        self.sizes: NDArray[np.int32] = np.frombuffer(index, "<i4", items, 34)
        self.starts: NDArray[np.int64] = np.frombuffer(index, "<i8", items, 34 + 4 * items)
        self.bounds: NDArray[np.int64] = np.frombuffer(index, "<i8", bounds, 34 + 12 * items)
        self._prefix = prefix
        self._data = _opened(_with(prefix, ".bin"))
        weakref.finalize(self, os.close, self._data)
        self._end = os.fstat(self._data).st_size
        expected = int(self.sizes.sum(dtype=np.int64)) * self.dtype.itemsize
        if self._end != expected:
            raise DataError(f"{prefix}.bin has {self._end} bytes, its index says {expected}")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: int) -> NDArray[Any]:
        """The elements of an item."""
        return self._read(int(self.starts[item]), int(self.sizes[item]))

    def stretches(self, size: int = STRETCH) -> Iterator[NDArray[Any]]:
        """All elements, item after item, so many at a time."""
        for start in range(0, self._end, size * self.dtype.itemsize):
            yield self._read(start, size)

    def _read(self, start: int, size: int) -> NDArray[Any]:
        """Elements from a byte on: so many, or as many as there are."""
        wanted = min(size * self.dtype.itemsize, self._end - start)
        found = os.pread(self._data, wanted, start)
        if len(found) < wanted:
            raise DataError(
                f"{self._prefix}.bin ends within the {wanted} bytes from {start} on; it had {self._end}",
                hint="somebody writes it while it is read",
            )
        return np.frombuffer(found, self.dtype)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.bounds) - 1

    def document(self, number: int) -> list[NDArray[Any]]:
        """The items of a document, of which there may be none."""
        first, end = self.bounds[number : number + 2]
        return [self[item] for item in range(first, end)]


@dataclass(frozen=True)
class Pack:
    """A training sequence of n tokens with its pictures.

    ``patches`` (m, 3 * P * P) is None where pictures are stored encoded.
    """

    text: NDArray[np.int64]
    role: NDArray[np.int64]
    patch_indices: NDArray[np.int64]
    pictures: list[bytes]
    patches: NDArray[np.float16] | None


class PackedShard:
    """The packs of one indexed shard."""

    def __init__(self, folder: Path | str) -> None:
        """Map the shard's files.

        Raises:
            DataError: the folder is no indexed shard, or its files disagree.
        """
        self.folder = Path(folder)
        self.facts: dict[str, Any] = read_manifest(folder, kind="indexed")["facts"]
        self._text = IndexedReader(self.folder / TEXT)
        self._role = IndexedReader(self.folder / ROLE)
        self._indices = self._optional(INDICES)
        self._images = self._optional(IMAGE)
        self._patches = self._optional(PATCHES)
        others = (self._role, self._indices, self._patches)
        if any(other and not np.array_equal(other.bounds, self._text.bounds) for other in others):
            raise DataError(f"the files of {folder} do not hold the same number of packs")

    def __len__(self) -> int:
        return len(self._text)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """The number of tokens of each pack."""
        return self._text.sizes

    def pack(self, number: int) -> Pack:
        """Read one pack; arrays are copies."""
        text = self._text[number].astype(np.int64)
        none = np.full(len(text), -1, np.int64)
        images, patches = self._images, self._patches
        return Pack(
            text=text,
            role=self._role[number].astype(np.int64),
            patch_indices=self._indices[number].astype(np.int64) if self._indices else none,
            pictures=[item.tobytes() for item in images.document(number)] if images else [],
            patches=self._halves(patches[number]) if patches else None,
        )

    def __iter__(self) -> Iterator[Pack]:
        return map(self.pack, range(len(self)))

    def rows(self) -> list[dict[str, int]]:
        """The counts of each pack, as data.jsonl has them."""
        return [*read_rows(self.folder)]

    def _optional(self, name: str) -> IndexedReader | None:
        return IndexedReader(self.folder / name) if (self.folder / f"{name}.idx").is_file() else None

    def _halves(self, bits: NDArray[np.uint16]) -> NDArray[np.float16]:
        return bits.view(np.float16).reshape(-1, 3 * self.facts["patch_size"] ** 2).copy()


# Counts of packs


ROWS = "data.jsonl"
COUNTS: dict[str, str] = {
    "tokens": "n_tokens",
    "image_tokens": "n_image_tokens",
    "images": "n_images",
    "loss_tokens": "n_loss_tokens",
}
"""What is counted of each pack, by the name of what it sums up to."""
ROW = "{" + ", ".join(f'"{key}": %d' for key in COUNTS.values()) + "}\n"
"""A line of data.jsonl."""


class RowsWriter:
    """Writes data.jsonl, a row of counts a pack.

    Attributes:
        totals: what they sum up to, and how many ``packs`` they are of.
    """

    def __init__(self, folder: Path) -> None:
        """Start the file."""
        self.totals: Counter[str] = Counter()
        self._file = (folder / ROWS).open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def packs(self, *columns: Sequence[int]) -> None:
        """Append packs by their counts, a column for each of COUNTS."""
        self._file.writelines(map(ROW.__mod__, zip(*columns, strict=True)))
        self.totals.update(totals(dict(zip(COUNTS.values(), columns, strict=True))))


def totals(columns: Mapping[str, Sequence[int] | NDArray[Any]]) -> dict[str, int]:
    """What the counts of packs sum up to, and how many packs they are of."""
    return {
        "packs": len(columns["n_tokens"]),
        **{name: int(np.sum(columns[key], dtype=np.int64)) for name, key in COUNTS.items()},
    }


def read_rows(folder: Path) -> Iterator[dict[str, int]]:
    """The rows of data.jsonl."""
    with (folder / ROWS).open("rb") as lines:
        yield from map(orjson.loads, lines)


def read_columns(folder: Path) -> dict[str, NDArray[np.int32]]:
    """Each of COUNTS, pack by pack."""
    columns = {key: array("i") for key in COUNTS.values()}
    for row in read_rows(folder):
        for key, column in columns.items():
            column.append(row[key])
    return {key: np.asarray(column, np.int32) for key, column in columns.items()}


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _mapped(path: Path) -> mmap.mmap | bytes:
    """Map a file; an empty one cannot be mapped and needs no mapping."""
    number = _opened(path)
    try:
        return mmap.mmap(number, 0, access=mmap.ACCESS_READ) if os.fstat(number).st_size else b""
    finally:
        os.close(number)


def _opened(path: Path) -> int:
    """The number of a file that is open."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
