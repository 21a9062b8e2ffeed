"""What equal and similar samples are told by: digests of a sample, of its text and of its pictures.

Text is compared without regard to case and width, and without white space. Similar texts share most of their
pieces of five characters, of the first ``TEXT`` ones, which MinHash (rensa) estimates. Similar pictures have
similar difference hashes: of 9 x 8 grey points, is each brighter than the one to its right?
"""

import hashlib
import io
import sqlite3
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from plait.data.chat import Sample, Text
from plait.errors import DataError

PERMUTATIONS = 64
SEED = 1
PIECE = 5
TEXT = 4_000
"""Characters of a text that similar ones are found by."""
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
SPREAD = np.uint32(0x9E3779B1)
"""2**32 over the golden ratio, odd: multiplying by it spreads bits (Knuth, The Art of Computer Programming,
volume 3, section 6.4)."""
SPACES = bytes(byte for byte in range(128) if chr(byte).isspace())
SMALL = bytes(range(256)).lower()
BATCH = 64
"""Samples whose texts are looked at at once."""
AHEAD = 4
"""Batches that other processes may have before their rows are waited for."""


def digest(sample: Sample) -> bytes:
    """The same of samples that say the same, with the same pictures in the same places."""
    found = hashlib.sha256()
    for message in sample.messages:
        for part in message.parts:
            content = part.text.encode() if isinstance(part, Text) else part.encoded
            kind = b"t" if isinstance(part, Text) else b"p"
            found.update(b"%s %s %d " % (message.role.encode(), kind, len(content)) + content)
    return found.digest()


def rows(samples: Sequence[tuple[Sample, str]], digests: Sequence[bytes | None] = ()) -> NDArray[Any]:
    """Samples with their ids as ROWs (n,); ``digests`` are theirs, where they are known."""
    found = np.zeros(len(samples), ROW)
    texts = [_text(sample) for sample, _ in samples]
    said = np.flatnonzero([bool(text) for text in texts])
    if len(said):
        found["pieces"][said] = pieces([texts[number] for number in said])
    known = [one or digest(sample) for (sample, _), one in zip_longest(samples, digests)]
    found["sample"] = np.frombuffer(b"".join(one[:8] for one in known), ">u8")
    found["id"] = [_number(id_.encode()) if id_ else 0 for _, id_ in samples]
    found["text"] = [_number(text.encode()) if text else 0 for text in texts]
    for one, (sample, _) in zip(found, samples, strict=True):
        pictures = sample.pictures
        if not pictures:
            continue
        one["count"] = len(pictures)
        for place, picture in enumerate(pictures[:PICTURES]):
            one["picture"][place] = _number(picture)
            one["look"][place] = look(picture)
    return found


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


def _text(sample: Sample) -> str:
    said = "".join(part.text for m in sample.messages for part in m.parts if isinstance(part, Text))
    if said.isascii():  # the same, some five times as quick
        return said.encode().translate(SMALL, SPACES).decode()
    return "".join(unicodedata.normalize("NFKC", said).casefold().split())


def pieces(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash numbers (n, PERMUTATIONS) of texts, none of which is empty."""
    from rensa import RMinHash

    starts = [text[:TEXT].ljust(PIECE, "\0") for text in texts]
    ends = np.cumsum([len(start) for start in starts])
    hashes = _windows("".join(starts), ends)
    bounds = np.concatenate([[0], ends[:-1], [len(hashes)]])
    found = RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, bounds.astype(np.uint64), PERMUTATIONS, SEED
    )
    return np.array(found.to_rows(), np.uint32)


def _windows(joined: str, ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for each piece of PIECE characters of the texts, which end at ``ends``.

    In the place of those that two texts have parts of stands the first of the earlier text once more.
    """
    points = np.frombuffer(joined.encode("utf-32-le"), "<u4")
    pairs = _mixed(points[:-1], points[1:])
    fours = _mixed(pairs[:-2], pairs[2:])
    found = _mixed(fours[:-1], points[PIECE - 1 :])
    found *= SPREAD
    found ^= found >> np.uint32(13)
    first = np.concatenate([[0], ends[:-1]])[:-1]
    for place in range(1, PIECE):
        found[ends[:-1] - place] = found[first]
    return found.astype(np.uint64)


def _mixed(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A number for each two, in their order."""
    found = first * SPREAD
    found ^= found >> np.uint32(15)
    found += second
    return found


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


# Many


class Prints:
    """Writes the rows of samples, and their ids, beside other files of a folder."""

    def __init__(self, folder: Path, others: Executor | None = None) -> None:
        """Start both files; ``others`` are processes that look at the samples, in place of this one."""
        self.folder, self._others = folder, others
        self._held: list[tuple[Sample, str]] = []
        self._digests: list[bytes | None] = []
        self._waited: deque[Future[NDArray[Any]]] = deque()
        self._rows = (folder / f"{NAME}.bin").open("wb")
        self._ids = (folder / f"{NAME}.ids").open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write()
            self._wait(0)
        self._rows.close()
        self._ids.close()

    def append(self, sample: Sample, id_: str, known: bytes | None = None) -> None:
        """Note a sample, and its digest, if it is known."""
        self._held.append((sample, id_))
        self._digests.append(known)
        if len(self._held) == BATCH:
            self._write()

    def _write(self) -> None:
        self._ids.write(b"".join(orjson.dumps(id_) + b"\n" for _, id_ in self._held))
        if self._others is None:
            self._rows.write(rows(self._held, self._digests).tobytes())
        else:
            self._waited.append(self._others.submit(rows, self._held, self._digests))
            self._wait(AHEAD)
        self._held, self._digests = [], []

    def _wait(self, left: int) -> None:
        """Write what others have looked at, in order, until so many batches are left to them."""
        while len(self._waited) > left:
            self._rows.write(self._waited.popleft().result().tobytes())


def stand(folder: Path | str) -> bool:
    """Whether a folder has the rows of its samples."""
    return Path(folder, f"{NAME}.bin").is_file()


def read(folder: Path | str) -> NDArray[Any]:
    """The rows of a folder, mapped.

    Raises:
        DataError: it has none: another version or program packed it.
    """
    path = Path(folder, f"{NAME}.bin")
    if not path.is_file():
        raise DataError(
            f"{folder} does not say which of its samples are alike", hint="remove it and ask for it again"
        )
    return np.memmap(path, ROW, "r") if path.stat().st_size else np.zeros(0, ROW)


def ids(folder: Path | str, rows: Sequence[int]) -> Iterator[str]:
    """The ids of some rows, which are in order."""
    wanted = iter(rows)
    number = next(wanted, None)
    with Path(folder, f"{NAME}.ids").open("rb") as lines:
        for place, line in enumerate(lines):
            while place == number:
                yield orjson.loads(line)
                number = next(wanted, None)


class Seen:
    """What was seen before, in a temporary file: memory does not grow with it."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._known = sqlite3.connect("")
        self._known.execute("pragma journal_mode = off")
        self._known.execute("create table seen (key blob primary key, place text) without rowid")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._known.close()

    def before(self, key: bytes, place: str) -> str | None:
        """The place that a key was seen at first; None if that is now."""
        if self._known.execute("insert or ignore into seen values (?, ?)", (key, place)).rowcount:
            return None
        (first,) = self._known.execute("select place from seen where key = ?", (key,)).fetchone()
        return str(first)
