"""Pictures in a zip, read in place: LLaVA-Pretrain's 558,128 pictures need not become files.

Where a picture lies is found once, when the raw source is made, and stands in its record.
"""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

from plait.errors import DataError, RecordError

HEADER = struct.Struct("<4s22x2H")
"""Of each file's own header: its mark, and how long are the name and the extra field behind it."""
MARK = b"PK\x03\x04"
LARGEST = 1 << 28
"""Bytes of a picture; a small zip may say that it unpacks to anything."""
STORED, DEFLATED = 0, 8
"""How a zip says that bytes are packed."""

Place = list[int]
"""Offset of the packed bytes, how many they are, how they are packed, how many they become."""


class Zip:
    """An open zip of pictures."""

    def __init__(self, path: Path) -> None:
        """Read its table of contents.

        Raises:
            DataError: it is damaged or no zip.
        """
        import zipfile

        self.path = path
        try:
            with zipfile.ZipFile(path) as opened:
                self.infos = {info.filename: info for info in opened.infolist() if not info.is_dir()}
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} is damaged or no zip: {error}", hint="fetch it again") from error
        tops = {name.partition("/")[0] for name in self.infos}
        self.top = f"{tops.pop()}/" if len(tops) == 1 else ""
        """The one folder that everything lies in: lists mostly do not name it."""

    def place(self, name: Any) -> Place | None:
        """Where a picture lies; None where there is none of that name."""
        info = self.infos.get(name) or self.infos.get(f"{self.top}{name}")
        if info is None or info.compress_type not in (STORED, DEFLATED) or info.file_size > LARGEST:
            return None
        begin = content_at(self.path, info.header_offset)
        return [begin, info.compress_size, info.compress_type, info.file_size]


def content_at(path: Path, header: int) -> int:
    """Where the bytes of a file in a zip begin.

    Args:
        path: the zip.
        header: where the file's own header begins.

    Raises:
        DataError: there is none.
    """
    with path.open("rb") as file:
        head = os.pread(file.fileno(), HEADER.size, header)
    if len(head) < HEADER.size or not head.startswith(MARK):
        raise DataError(f"{path} is damaged: no file begins at {header}, where one should")
    _, name_size, extra = HEADER.unpack(head)
    return int(header + HEADER.size + name_size + extra)


def read(path: Path, place: Place) -> bytes:
    """The picture that lies there.

    Raises:
        RecordError: nothing can be read there.
    """
    begin, packed, kind, size = place
    try:
        with path.open("rb") as file:
            content = os.pread(file.fileno(), packed, begin)
        if kind == DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size or 1)  # 0: no limit
    except (OSError, zlib.error) as error:
        raise RecordError(f"picture cannot be read: {error}", reason="missing_picture") from error
    if len(content) != size:
        raise RecordError(f"picture of {size} bytes is cut short in {path.name}", reason="missing_picture")
    return content
