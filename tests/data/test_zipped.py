import tracemalloc
import zipfile

import pytest

from plait.data import zipped
from plait.errors import RecordError


def test_a_size_that_lies_is_found_before_memory_is_taken(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", bytes(50_000_000))
    content = bytearray(path.read_bytes())
    size = content.rfind(b"PK\x01\x02") + 24
    content[size : size + 4] = bytes(4)
    path.write_bytes(content)
    place = zipped.Zip(path).place("1.jpg")
    assert place is not None

    tracemalloc.start()
    with pytest.raises(RecordError, match=r"cut short in a\.zip"):
        zipped.read(path, place)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert most < 1_000_000


def test_an_empty_file_is_read(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", b"")
    place = zipped.Zip(path).place("1.jpg")
    assert place is not None
    assert zipped.read(path, place) == b""
