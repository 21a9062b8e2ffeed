"""What equal and similar samples are told by: what they say (:mod:`plait.data.said`), and their pictures.

Similar pictures have similar difference hashes: of 9 x 8 grey points, is each brighter than the one to its
right?
"""

import io
import os
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from plait.data import said
from plait.data.chat import SAMPLES, Sample
from plait.data.said import PERMUTATIONS, number_of
from plait.errors import DataError

PICTURES = 4
"""Pictures of a sample that are looked at one by one; all are part of its digest."""
ROW = np.dtype(
    [
        ("id", "<u8"),
        ("sample", "<u8"),
        ("text", "<u8"),
        ("pieces", "<u4", (PERMUTATIONS,)),
        ("count", "<u4"),
        ("picture", "<u8", (PICTURES,)),
        ("look", "<u8", (PICTURES,)),
    ]
)
"""A sample; 0 stands where it has no such thing. ``count`` is the number of its pictures."""
NAME = "data-prints"


def rows(samples: Sequence[tuple[Sample, str]], known: Sequence[bytes | None] = ()) -> NDArray[Any]:
    """Samples with their ids as ROWs (n,); ``known`` are the bytes of their rows of what they say."""
    found = np.zeros(len(samples), ROW)
    there = b"".join(one for one in known if one)
    if len(there) < len(samples) * said.ROW.itemsize:
        there = b"".join(_said(samples[first : first + SAMPLES]) for first in range(0, len(samples), SAMPLES))
    told = np.frombuffer(there, said.ROW)
    found["text"], found["pieces"] = told["text"], told["pieces"]
    found["sample"] = np.frombuffer(told["digest"].tobytes(), ">u8")[:: said.WORDS]
    found["id"] = [number_of(id_.encode()) if id_ else 0 for _, id_ in samples]
    for number, (sample, _) in enumerate(samples):
        pictures = sample.pictures
        if not pictures:
            continue
        one = found[number]
        one["count"] = len(pictures)
        for place, picture in enumerate(pictures[:PICTURES]):
            one["picture"][place] = number_of(picture)
            one["look"][place] = look(picture)
    return found


def _said(samples: Sequence[tuple[Sample, str]]) -> bytes:
    return said.rows([sample for sample, _ in samples]).tobytes()


def look(picture: bytes) -> int:
    """The difference hash of a picture, 64 bits; 0 where it does not open."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture)) as image:
            image.draft("L", (36, 32))
            points = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    except (OSError, ValueError):
        return 0
    return int.from_bytes(np.packbits(points[:, :-1] > points[:, 1:]).tobytes(), "big")


# Many


class Prints:
    """Writes the rows of samples, and their ids, beside other files of a folder."""

    def __init__(self, folder: Path) -> None:
        """Start both files."""
        self.folder = folder
        self._rows = (folder / f"{NAME}.bin").open("wb")
        self._ids = (folder / f"{NAME}.ids").open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        self._ids.close()

    def extend(self, found: NDArray[Any], ids: Sequence[str]) -> None:
        """Write rows, and their samples' ids."""
        self._rows.write(found.tobytes())
        self._ids.write(b"".join(orjson.dumps(id_) + b"\n" for id_ in ids))


def stand(folder: Path | str) -> bool:
    """Whether a folder has the rows of its samples."""
    return Path(folder, f"{NAME}.bin").is_file()


class Printed:
    """The rows of a folder as an array, read where they are looked at: were they mapped, all would stay."""

    def __init__(self, folder: Path | str) -> None:
        """Take the folder.

        Raises:
            DataError: it has none: another version or program packed it.
        """
        self._path = Path(folder, f"{NAME}.bin")
        if not stand(folder):
            raise DataError(
                f"{folder} does not say which of its samples are alike",
                hint="remove it and ask for it again",
            )
        self._size = self._path.stat().st_size // ROW.itemsize

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, which: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Rows that stand together, or some by their numbers."""
        if isinstance(which, slice):
            places = range(*which.indices(len(self)))
            several = np.fromfile(self._path, ROW, len(places), offset=places.start * ROW.itemsize)
            self._check(len(several) == len(places))
            return several
        found, size = np.empty(len(which), ROW), ROW.itemsize
        room = found.view(np.uint8).data
        with self._path.open("rb") as file:
            number = file.fileno()
            for place, row in enumerate(which.tolist()):
                one = room[place * size : (place + 1) * size]
                self._check(os.preadv(number, [one], row * size) == size)
        return found

    def _check(self, whole: bool) -> None:
        if not whole:
            raise DataError(
                f"{self._path} has fewer than the {len(self)} rows that it had",
                hint="somebody writes it while it is read",
            )


def ids(folder: Path | str, rows: Sequence[int]) -> Iterator[str]:
    """The ids of some rows, which are in order."""
    wanted = iter(rows)
    number = next(wanted, None)
    with Path(folder, f"{NAME}.ids").open("rb") as lines:
        for place, line in enumerate(lines):
            while place == number:
                yield orjson.loads(line)
                number = next(wanted, None)


HELD = 1 << 16
"""Keys that are in memory; of more than these the older half goes to a file."""
MARKS = 1 << 22
"""Places of marks: a key of whose place none was filed is not looked for in the file."""


class Seen:
    """What was seen before: the last few in memory, the others in a temporary file, so memory is bounded."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._held: dict[bytes, object] = {}
        self._marks = bytearray(MARKS)
        self._known = sqlite3.connect("")
        self._known.execute("pragma journal_mode = off")
        self._known.execute("create table seen (key blob primary key, place text) without rowid")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._known.close()

    def before(self, key: bytes, place: object) -> str | None:
        """The place that a key was seen at first, in words; None if that is now."""
        first = self._held.get(key)
        if first is None and self._marks[hash(key) % MARKS]:
            found = self._known.execute("select place from seen where key = ?", (key,)).fetchone()
            first = found[0] if found else None
        if first is not None:
            return str(first)
        self._held[key] = place
        if len(self._held) == HELD:
            self._file()
        return None

    def _file(self) -> None:
        older = sorted(islice(self._held.items(), HELD // 2), key=itemgetter(0))
        self._known.executemany("insert into seen values (?, ?)", ((key, str(place)) for key, place in older))
        for key, _ in older:
            self._marks[hash(key) % MARKS] = True
        del older
        self._held = dict(islice(self._held.items(), HELD // 2, None))  # were they taken out, it would grow
