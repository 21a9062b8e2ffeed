"""What a sample says, in numbers by which equal and similar ones are told: made once, beside its chat record.

``shard_00000.said`` has a row for each line of ``shard_00000.jsonl.gz``; beside few lines there is none. Text
is compared without regard to case and width, and without white space. Similar texts share most of their
pieces of five characters, of the first ``TEXT`` ones, which MinHash (rensa) estimates.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from plait.data.chat import SAMPLES, Sample, Text
from plait.errors import DataError
from plait.layout import said_of

PERMUTATIONS = 64
"""Numbers of a text. The share of them that two texts have alike is the share of their pieces, give or take
0.5 / sqrt(64) = 6 %: Broder's MinHash (On the resemblance and containment of documents, 1997)."""
SEED = 1
"""Of the permutations. Prints of other seeds cannot be compared: with another, VERSIONS of chat grows."""
PIECE = 5
"""Characters of a piece: about a word, in scripts without spaces too."""
TEXT = 4_000
"""Characters of a text that similar ones are found by, its first: what it costs stays within bounds."""
ROW = np.dtype([("line", "<u4"), ("digest", "V32"), ("text", "<u8"), ("pieces", "<u4", (PERMUTATIONS,))])
"""A line: its checksum (CRC-32), the digest of its sample, and of its text; 0 where there is none."""
DIGEST = slice(ROW.fields["digest"][1], ROW.fields["digest"][1] + ROW["digest"].itemsize)  # type: ignore[index]
"""Where the digest is in the bytes of a row."""
WORDS = ROW["digest"].itemsize // 8
"""Numbers of 64 bits in a digest."""
SPREAD = np.uint32(0x9E3779B1)
"""2**32 over the golden ratio, odd: multiplying by it spreads bits (Knuth, The Art of Computer Programming,
volume 3, section 6.4)."""
SPACES = bytes(byte for byte in range(128) if chr(byte).isspace())
SMALL = bytes(range(256)).lower()


def digest(sample: Sample) -> bytes:
    """The same of samples that say the same, pictures in the same places; an empty text is none."""
    found = hashlib.sha256()
    for message in sample.messages:
        for part in message.parts:
            content = part.text.encode() if isinstance(part, Text) else part.encoded
            if not content:
                continue
            kind = b"t" if isinstance(part, Text) else b"p"
            found.update(b"%s %s %d " % (message.role.encode(), kind, len(content)) + content)
    return found.digest()


def rows(samples: Sequence[Sample], lines: Sequence[bytes] = ()) -> NDArray[Any]:
    """Samples as ROWs (n,); ``lines`` are what they are written as, where they are."""
    found = np.zeros(len(samples), ROW)
    texts = [_text(sample) for sample in samples]
    with_text = np.flatnonzero([bool(text) for text in texts])
    if len(with_text):
        found["pieces"][with_text] = pieces([texts[number] for number in with_text])
    found["digest"] = np.frombuffer(b"".join(map(digest, samples)), "V32")
    found["text"] = [number_of(text.encode()) if text else 0 for text in texts]
    if lines:
        found["line"] = [isal_zlib.crc32(line) for line in lines]
    return found


def _text(sample: Sample) -> str:
    said = "".join(part.text for m in sample.messages for part in m.parts if isinstance(part, Text))
    if said.isascii():  # the same, some five times as quick
        return said.encode().translate(SMALL, SPACES).decode()
    return "".join(unicodedata.normalize("NFKC", said).casefold().split())


def number_of(content: bytes) -> int:
    """The first 64 bits of a digest."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


# Similar texts


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


# Beside the records


class Reader:
    """The rows of a file of records, line by line; each is checked to be its line's.

    Where none stand beside it, as beside few records or those of other programs, no line has one.
    """

    def __init__(self, chat: Path) -> None:
        """Look whether rows stand beside the records."""
        self._path = Path(said_of(str(chat)))
        self._known = self._path.is_file()
        self._rows = self._read()

    def of(self, line: bytes) -> bytes | None:
        """The row of the next line, its bytes; None where rows are not known.

        Raises:
            DataError: the rows are of other records.
        """
        if not self._known:
            return None
        found = next(self._rows, b"")
        if len(found) < ROW.itemsize or int.from_bytes(found[:4], "little") != isal_zlib.crc32(line):
            self._refuse()
        return found

    def end(self) -> None:
        """No line is left.

        Raises:
            DataError: rows are left.
        """
        if self._known and next(self._rows, None) is not None:
            self._refuse()

    def _refuse(self) -> None:
        raise DataError(
            f"{self._path} is not of the records beside it",
            hint="they were changed since: make the shard again, or remove that file, and it is done without",
        )

    def _read(self) -> Iterator[bytes]:
        size = ROW.itemsize
        with self._path.open("rb") as file:
            while content := file.read(SAMPLES * size):
                yield from (content[start : start + size] for start in range(0, len(content), size))
