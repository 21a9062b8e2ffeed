import gzip
import random
import tracemalloc
from collections.abc import Callable
from functools import partial

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from plait.data.lines import read_lines
from plait.errors import DataError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".lz4": lz4.frame.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
PACKED = [suffix for suffix in PACKERS if suffix]


def written(folder, suffix: str, content: bytes):
    path = folder / f"x.jsonl{suffix}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", PACKERS)
@given(lines=st.lists(st.binary(max_size=50).map(lambda b: b.replace(b"\n", b"").rstrip(b"\r")), max_size=50))
def test_lines_come_back_numbered(tmp_path_factory, suffix, lines):
    content = b"".join(line + b"\n" for line in lines)
    path = written(tmp_path_factory.mktemp("lines"), suffix, PACKERS[suffix](content))
    if content.startswith(b"\xef\xbb\xbf"):
        return
    if not suffix and content.startswith((b"\x1f\x8b", b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd")):
        return
    assert list(read_lines(path)) == list(enumerate(lines, start=1))


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_last_line_needs_no_end_and_windows_ends_are_taken_off(tmp_path, suffix):
    path = written(tmp_path, suffix, PACKERS[suffix](b"one\r\n\ntwo"))
    assert list(read_lines(path)) == [(1, b"one"), (2, b""), (3, b"two")]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_byte_order_mark_is_no_part_of_the_first_line_and_text_of_any_other(tmp_path, suffix):
    mark = b"\xef\xbb\xbf"
    path = written(tmp_path, suffix, PACKERS[suffix](mark + b"{}\n" + mark + b"two\n"))
    assert list(read_lines(path)) == [(1, b"{}"), (2, mark + b"two")]


@pytest.mark.parametrize("suffix", PACKED)
def test_several_streams_in_one_file_are_read_one_after_the_other(tmp_path, suffix):
    path = written(tmp_path, suffix, PACKERS[suffix](b"one\nt") + PACKERS[suffix](b"wo\n"))
    assert list(read_lines(path)) == [(1, b"one"), (2, b"two")]


@pytest.mark.parametrize("suffix", [".lz4", ".zst"])
def test_frames_that_readers_pass_over_are_no_lines(tmp_path, suffix):
    """Parallel compressors put one first, with sizes of the others."""
    skipped = b"\x53\x2a\x4d\x18\x05\0\0\0notes"
    path = written(
        tmp_path, suffix, skipped + PACKERS[suffix](b"one\n") + skipped + PACKERS[suffix](b"two\n")
    )
    assert list(read_lines(path)) == [(1, b"one"), (2, b"two")]


@pytest.mark.parametrize("window", [27, 28, 31])
def test_frames_that_look_far_back_are_read(tmp_path, window):
    """As `zstd --long` writes them, above all of large collections of text."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window, compression_level=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = written(tmp_path, ".zst", stream.compress(b"one\ntwo\n") + stream.flush())
    assert list(read_lines(path)) == [(1, b"one"), (2, b"two")]


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.9999])
def test_a_file_cut_short_is_named(tmp_path, suffix, share):
    content = PACKERS[suffix](
        b"".join(b'{"n": %d}\n' % random.Random(n).getrandbits(90) for n in range(20_000))
    )
    path = written(tmp_path, suffix, content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"x\.jsonl\..* is cut short or damaged"):
        list(read_lines(path))


@pytest.mark.parametrize("suffix", PACKED)
def test_damaged_bytes_are_named(tmp_path, suffix):
    checked = {
        ".gz": gzip.compress,
        ".lz4": partial(lz4.frame.compress, content_checksum=True),
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    content = bytearray(checked[suffix](random.Random(1).randbytes(100_000)))
    content[50_000:50_064] = bytes(64)
    path = written(tmp_path, suffix, bytes(content))
    with pytest.raises(DataError, match=r"x\.jsonl"):
        list(read_lines(path))


@pytest.mark.parametrize("suffix", PACKED)
def test_a_name_that_lies_is_refused(tmp_path, suffix):
    with pytest.raises(DataError, match=f"is named {suffix} but"):
        list(read_lines(written(tmp_path, suffix, b'{"role": "user"}\n')))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_lines(tmp_path / "x.jsonl"))


def test_what_the_system_says_of_a_file_is_not_taken_for_damage(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        list(read_lines(tmp_path))
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("suffix", PACKERS)
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    content = b"".join(b"line %d of forty bytes, again and again\n" % number for number in range(500_000))
    path = written(tmp_path, suffix, PACKERS[suffix](content))
    tracemalloc.start()
    assert sum(1 for _ in read_lines(path)) == 500_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20 < len(content) / 2
