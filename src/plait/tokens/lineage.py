"""Where the documents of a packed shard come from: the line of each one's chat record, and of its raw source.

``data-lineage`` is a pair of Megatron's indexed files like those of the tokens: item i is pack i, with
``COLUMNS`` numbers for each of its documents, in their order. ``data-lineage.json`` names the files that
the numbers ``chat`` and ``raw`` stand for; -1 stands for a raw line that the chat record does not name.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from plait import files, layout
from plait.data.chat import Source
from plait.data.rejects import Record
from plait.errors import DataError
from plait.tokens.indexed import IndexedReader, IndexedWriter
from plait.tokens.pack import Packing, Pieces

LINEAGE = "data-lineage"
AT_ONCE = 1 << 14
"""Packs that are written, and documents that are read, at once."""
COLUMNS = ("chat", "line", "raw", "raw_line", "start", "end")
"""Files by their numbers, lines from 1; ``start`` and ``end`` are tokens of the document, if it was cut."""
UNKNOWN = -1


@dataclass(frozen=True)
class Origin:
    """Tokens ``start`` to ``end`` of the document of a chat record; ``raw`` is empty where it is unknown."""

    chat: str
    line: int
    raw: str
    raw_line: int
    start: int
    end: int

    def __str__(self) -> str:
        """The raw line, or that of the chat record where it is unknown."""
        return f"{self.raw}:{self.raw_line}" if self.raw else f"{self.chat}:{self.line}"


class Origins:
    """Takes in the lines of documents, in their order, and writes the lineage of a shard."""

    def __init__(self, folder: Path) -> None:
        """Start the files in the shard's folder."""
        self.folder = folder
        self._chats: dict[str, int] = {}
        self._raws: dict[str, int] = {}
        self._files, self._lines = array("i"), array("q")
        self._known: dict[tuple[Path, str | None], tuple[int, int]] = {}
        self._out = IndexedWriter(folder / LINEAGE, np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.__exit__(kind, error, trace)
        if kind is None:
            names = {"chats": [*self._chats], "raw": [*self._raws]}
            files.write_json(self.folder / f"{LINEAGE}.json", names)

    def append(self, record: Record, source: Source | None) -> None:
        """Note the record of the next document."""
        name, line = (source.file, source.line) if source else (None, UNKNOWN)
        files = self._known.get((record.file, name))
        if files is None:
            files = self._known[record.file, name] = self._new(record, source)
        self._files.extend(files)
        self._lines.extend((record.line or UNKNOWN, line))

    def _new(self, record: Record, source: Source | None) -> tuple[int, int]:
        """The numbers of a record's file, and of that of its raw line."""
        chat = self._chats.setdefault(layout.inside(record.file), len(self._chats))
        if source is None:
            return chat, UNKNOWN
        return chat, self._raws.setdefault(source.path(record.file), len(self._raws))

    def write(self, cuts: Pieces, packing: Packing) -> None:
        """Write the lineage of packed pieces of the documents, and begin anew with others."""
        (chats, raws), (lines, raw_lines) = (
            np.array(both).reshape(-1, 2).T for both in (self._files, self._lines)
        )
        for first in range(0, len(packing), AT_ONCE):
            offsets = packing.offsets[first : first + AT_ONCE + 1]
            pieces = packing.order[offsets[0] : offsets[-1]]
            origins = (column[cuts.document[pieces]] for column in (chats, lines, raws, raw_lines))
            rows = np.column_stack([*origins, cuts.start[pieces], cuts.end[pieces]])
            self._out.documents(rows.ravel(), np.diff(offsets) * len(COLUMNS))
        del self._files[:], self._lines[:]


class Lineage:
    """Reads the lineage of a packed shard."""

    def __init__(self, folder: Path | str) -> None:
        """Map the files.

        Raises:
            DataError: the shard has none, for another version or program packed it.
        """
        self.folder = Path(folder)
        if not self.stands(folder):
            raise DataError(
                f"{folder} does not say where its documents come from: it was not packed by this plait",
                hint="remove it and ask for it again",
            )
        self._names: dict[str, list[str]] = files.read_json(self.folder / f"{LINEAGE}.json")
        self._items = IndexedReader(self.folder / LINEAGE)

    @staticmethod
    def stands(folder: Path | str) -> bool:
        """Whether a shard has a lineage; those that others packed have none."""
        return Path(folder, f"{LINEAGE}.json").is_file()

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, or part of one, pack by pack, without separators that were put before."""
        start, end = (COLUMNS.index(name) for name in ("start", "end"))
        stretches = self._items.stretches(AT_ONCE * len(COLUMNS))
        tables = (stretch.reshape(-1, len(COLUMNS)) for stretch in stretches)
        found = [(rows[:, end] - rows[:, start]).astype(np.int32) for rows in tables]
        return np.concatenate([np.empty(0, np.int32), *found])

    def __len__(self) -> int:
        """The number of packs."""
        return len(self._items)

    def __getitem__(self, pack: int) -> Sequence[Origin]:
        """The documents of a pack, in their order."""
        rows: NDArray[Any] = self._items[pack].reshape(-1, len(COLUMNS))
        return [self._origin(*row) for row in rows.tolist()]

    def _origin(self, chat: int, line: int, raw: int, raw_line: int, start: int, end: int) -> Origin:
        name = "" if raw == UNKNOWN else self._names["raw"][raw]
        return Origin(self._names["chats"][chat], line, name, raw_line, start, end)
