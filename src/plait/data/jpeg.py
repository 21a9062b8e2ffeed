"""JPEG files that need no decoding to be known as whole.

A decoder of sequential JPEG stops for good over what stands before the coefficients, or over a file that
ends too early; over anything within them it goes on with a warning. So it is enough to read the segments, and
to find no marker among the coefficients but the last one. Of progressive files, and of others, this says
nothing.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

START, END = b"\xff\xd8", b"\xff\xd9"
TABLES_OF_CODES, QUANTISERS, RESTARTS, RESTART, SCAN = 0xC4, 0xDB, 0xDD, 0xD0, 0xDA
FRAMES = (0xC0, 0xC1)
"""Baseline and extended sequential, with Huffman codes."""
MODES = {1: "L", 3: "RGB"}
"""By the number of components."""
SKIPPED = (*range(0xE0, 0xF0), 0xFE)
"""What programs add, and comments."""
JFIF, JFIF_SIZE = 0xE0, 14
"""Its segment, without a picture in small."""
LONGEST_CODE = 16
LARGEST_DC = 15
"""The largest category of a difference between blocks."""


@dataclass(frozen=True)
class Head:
    """What stands before the coefficients of a sequential JPEG with all that its decoding needs."""

    size: tuple[int, int]
    """Width and height."""
    mode: str
    """Pillow's name of its colours: L or RGB."""
    coefficients: int
    """Where they begin."""
    plain: bool
    """Whether nothing was added to what a JFIF file has: no camera's tags, no colour profile."""

    def is_whole(self, encoded: bytes) -> bool:
        """Whether the coefficients go on to the end: no marker but restarts stands among them."""
        import numpy as np

        data = np.frombuffer(encoded, np.uint8, offset=self.coefficients)
        marks = (data[:-1] == END[0]) & (data[1:] != 0)
        count = np.count_nonzero(marks)
        if count > 1:  # a file may have no restarts at all
            count -= np.count_nonzero(marks & (data[1:] & 0xF8 == RESTART))
        return count == 1 and encoded.endswith(END)


def head(encoded: bytes) -> Head | None:
    """The head of a file; None where a look at its segments does not tell that it can be decoded."""
    try:
        return _head(encoded) if encoded.startswith(START) else None
    except IndexError:
        return None


def _head(encoded: bytes) -> Head | None:
    place, frame, tables, plain = len(START), b"", frozenset[tuple[int, int]](), True
    while True:
        mark, marker = encoded[place], encoded[place + 1]
        end = place + 2 + int.from_bytes(encoded[place + 2 : place + 4])
        body = encoded[place + 4 : end]
        if mark != START[0] or not place + 4 <= end <= len(encoded):
            return None
        if marker == SCAN:
            size = _number(frame, 3), _number(frame, 1)
            fits = min(size) and _fits(frame[:1] + frame[5:], body, tables)
            return Head(size, MODES[frame[5]], end, plain) if fits else None
        if marker in (TABLES_OF_CODES, QUANTISERS):
            found = (_codes if marker == TABLES_OF_CODES else _quantisers)(body)
            if not found:
                return None
            tables |= found
        elif marker in FRAMES and not frame:
            frame = body
        elif marker in SKIPPED:
            plain &= marker == JFIF and len(body) == JFIF_SIZE
        elif not (marker == RESTARTS and len(body) == 2):
            return None
        place = end


def _number(body: bytes, at: int) -> int:
    return int.from_bytes(body[at : at + 2])


@lru_cache(maxsize=256)
def _codes(body: bytes) -> frozenset[tuple[int, int]]:
    """Class and number of each table of Huffman codes; none where one is no code. Most files share them."""
    found, place = set(), 0
    while place < len(body):
        kind, counts = body[place], body[place + 1 : place + 1 + LONGEST_CODE]
        symbols = body[place + 17 : place + 17 + sum(counts)]
        free = list(accumulate(counts, lambda left, count: 2 * left - count, initial=1))
        whole = len(counts) == LONGEST_CODE and len(symbols) == sum(counts) <= 256
        if not whole or min(free) < 1 or kind & 0xEC or (kind < 16 and max(symbols, default=0) > LARGEST_DC):
            return frozenset()
        found.add((TABLES_OF_CODES + (kind >> 4), kind & 3))
        place += 17 + len(symbols)
    return frozenset(found)


@lru_cache(maxsize=256)
def _quantisers(body: bytes) -> frozenset[tuple[int, int]]:
    """The tables of quantisers; none where one is cut short."""
    found, place = set(), 0
    while place < len(body):
        kind = body[place]
        place += 65 if kind < 16 else 129
        if kind & 0xEC or place > len(body):
            return frozenset()
        found.add((QUANTISERS, kind & 3))
    return frozenset(found)


@lru_cache(maxsize=256)
def _fits(frame: bytes, scan: bytes, tables: frozenset[tuple[int, int]]) -> bool:
    """Whether the one scan has all components of the frame, and the tables that they are coded with.

    Args:
        frame: of its header, without the size.
        scan: the header of the scan.
        tables: class and number of those that the file has.
    """
    parts = [frame[at : at + 3] for at in range(2, len(frame), 3)]
    coded = [scan[at : at + 2] for at in range(1, len(scan) - 3, 2)]
    if len(frame) != 2 + 3 * frame[1] or len(scan) != 4 + 2 * scan[0] or len(parts) not in MODES:
        return False
    needed = {(QUANTISERS, part[2]) for part in parts}
    needed |= {(TABLES_OF_CODES, one[1] >> 4) for one in coded}
    needed |= {(TABLES_OF_CODES + 1, one[1] & 15) for one in coded}
    usual = {part[1] for part in parts} <= SAMPLINGS and all(part[1] == 0x11 for part in parts[1:])
    named = [part[0] for part in parts] == [one[0] for one in coded]
    plain = frame[0] == 8 and scan[-3:] == b"\x00\x3f\x00"
    return usual and named and plain and needed <= tables


SAMPLINGS = {0x11, 0x12, 0x21, 0x22, 0x41}
"""Components at full size, and colours at a half or a quarter of it."""


def with_exif(encoded: bytes, tags: bytes) -> bytes:
    """A JPEG file of ours with tags, where Pillow writes them: behind the first segment."""
    place = 4 + int.from_bytes(encoded[4:6])
    return encoded[:place] + b"\xff\xe1" + (len(tags) + 2).to_bytes(2) + tags + encoded[place:]
