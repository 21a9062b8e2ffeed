"""Lines of text files, plain or compressed with gzip, lz4 or zstd, in constant memory."""

import codecs
import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from plait.errors import DataError

if TYPE_CHECKING:
    import zstandard

MAGIC = {".gz": b"\x1f\x8b", ".lz4": b"\x04\x22\x4d\x18", ".zst": b"\x28\xb5\x2f\xfd"}
SKIPPED, SKIPPABLE, SKIPPING = bytes(range(0x50, 0x60)), b"\x2a\x4d\x18", (".lz4", ".zst")
"""How a frame begins that readers of both pass over, as parallel compressors put one before the others."""
WINDOW = 1 << 31
"""Bytes that a frame of zstd may look back, at most: what ``zstd --long=31`` writes. It is in memory then."""
CHUNK = 1 << 11
"""Bytes of zstd unpacked at a time; a chunk of the most repetitive text grows a thousandfold."""
BUFFER = 1 << 18
"""Bytes that lines are cut from at a time."""


@dataclass(frozen=True)
class RawLine:
    """One line of a raw source, not yet read."""

    file: str
    """Its file, relative to the source's folder."""
    number: int
    """Its line in that file, from 1."""
    position: int
    """Its line in the whole source, from 1."""
    content: Any
    """Its bytes; of a row of parquet, its values by column."""

    @property
    def blank(self) -> bool:
        """Whether it is a line with nothing on it."""
        return isinstance(self.content, bytes) and not self.content.strip()


def read_lines(path: Path | str) -> Iterator[tuple[int, bytes]]:
    """Give (line number from 1, line without its end) of a file that may be compressed.

    How a file is compressed is read from its first bytes; its name must not say otherwise. The mark
    that Windows programs put before UTF-8 is no part of the first line.

    Raises:
        DataError: the file is missing, cut short, damaged, or not what its name says.
        OSError: the system cannot read it; it is named.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, _unpacked(file, path) as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                yield number, text.rstrip(b"\r\n")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except OSError as error:
        error.filename = error.filename or str(path)  # of an error in reading it has none
        raise


@contextlib.contextmanager
def _unpacked(file: BinaryIO, path: Path) -> Iterator[Iterable[bytes]]:
    head = file.read(4)
    file.seek(0)
    found = next((kind for kind, magic in MAGIC.items() if head.startswith(magic)), "")
    if path.suffix in SKIPPING and head[0:1] in SKIPPED and head.endswith(SKIPPABLE):
        found = path.suffix
    if path.suffix in MAGIC and path.suffix != found:
        raise DataError(f"{path} is named {path.suffix} but does not hold such data")
    opener, damage = KINDS[found]
    try:
        with io.BufferedReader(opener(file), BUFFER) as stream:
            yield stream
    except damage() as error:
        if isinstance(error, OSError) and error.errno is not None:  # not of its content
            raise
        sentence = f"{path} is cut short or damaged: {error}"
        raise DataError(sentence, hint="fetch or copy the file again") from error


def _plain(file: BinaryIO) -> io.RawIOBase:
    return cast("io.RawIOBase", file)


def _gzip(file: BinaryIO) -> io.RawIOBase:
    from isal import igzip

    return cast("io.RawIOBase", igzip.open(file, "rb"))


def _of_gzip() -> tuple[type[Exception], ...]:
    from isal import isal_zlib

    return OSError, EOFError, cast("type[Exception]", isal_zlib.error)


def _lz4(file: BinaryIO) -> io.RawIOBase:
    import lz4.frame

    return cast("io.RawIOBase", lz4.frame.open(file, "rb"))


def _of_zstd() -> tuple[type[Exception], ...]:
    import zstandard

    return EOFError, zstandard.ZstdError


class ZstdFile(io.RawIOBase):
    """The content of a zstd file of one or more frames; unlike zstandard's own, it minds the end."""

    def __init__(self, file: BinaryIO) -> None:
        """Take an open file."""
        super().__init__()
        self.file = file
        self.unread = b""
        self.ready = memoryview(b"")
        self.frame = self._next_frame()
        self.inside = False

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill as much of ``buffer`` as is at hand; 0 at the end.

        Raises:
            EOFError: the file ends inside a frame.
        """
        while not self.ready:
            chunk = self.unread or self.file.read(CHUNK)
            self.unread = b""
            if not chunk:
                if self.inside:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._decompress(chunk)
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def _decompress(self, chunk: bytes) -> None:
        self.ready = memoryview(self.frame.decompress(chunk))
        self.inside = not self.frame.eof
        if self.frame.eof:
            self.unread = self.frame.unused_data
            self.frame = self._next_frame()

    def _next_frame(self) -> "zstandard.ZstdDecompressionObj":
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()


KINDS: dict[str, tuple[Callable[[BinaryIO], io.RawIOBase], Callable[[], tuple[type[Exception], ...]]]] = {
    "": (_plain, tuple),
    ".gz": (_gzip, _of_gzip),
    ".lz4": (_lz4, lambda: (EOFError, RuntimeError)),
    ".zst": (ZstdFile, _of_zstd),
}
"""What reads a kind of file, and what it raises on a cut or damaged one."""
