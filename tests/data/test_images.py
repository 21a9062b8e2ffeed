import io
import json
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from plait.data import images
from plait.errors import RecordError

SIDES = st.integers(1, 12_000)
SOLO = {"rule": "patches", "patch_size": 32, "max_side": 1024}


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def size(encoded: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(encoded)).size


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns", "tokens"),
    [
        (640, 480, 15, 20, 316),
        (500, 333, 11, 16, 188),
        (1920, 1080, 18, 32, 595),
        (333, 500, 16, 11, 193),
        (1, 1, 1, 1, 3),
        (33, 33, 2, 2, 7),
        (1024, 1024, 32, 32, 1057),
        (300, 10, 1, 10, 12),
    ],
)
def test_the_eight_sizes_that_solo_documents(width, height, rows, columns, tokens):
    assert images.patch_grid(width, height) == (rows, columns)
    assert rows * columns + (rows - 1) + 2 == tokens


@given(SIDES, SIDES, st.sampled_from([8, 14, 16, 32]), st.integers(1, 2048))
def test_a_grid_has_a_patch_on_each_side_and_stays_within_the_resolution(width, height, patch, most):
    rows, columns = images.patch_grid(width, height, patch_size=patch, max_resolution=most)
    assert min(rows, columns) >= 1
    assert max(rows, columns) * patch <= max(most, patch)
    assert images.patch_grid(height, width, patch_size=patch, max_resolution=most) == (columns, rows)


@given(SIDES, SIDES)
def test_a_grid_is_what_solos_formula_gives_where_that_gives_any(width, height):
    long, short = max(width, height), min(width, height)
    longer = min(math.ceil(long / 32) * 32, 1024)
    shorter = max(math.ceil(longer * short // long / 32) * 32, 32)
    assert sorted(images.patch_grid(width, height)) == [shorter // 32, longer // 32]


def test_the_side_that_solo_loses_is_kept():
    assert images.patch_grid(4000, 3) == (1, 32)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_needs_no_other_size_keeps_its_bytes(kind):
    encoded = encode(noise(64, 32), kind)
    assert images.resized(encoded, SOLO) is encoded
    assert images.resized(encoded, {**SOLO, "rule": "keep"}) is encoded
    assert images.resized(encoded, {**SOLO, "rule": "longest_side"}) is encoded
    url = json.loads(images.url_json(encoded))
    assert images.from_url(url) == encoded
    assert url.startswith(f"data:image/{kind.lower()};base64,")


@pytest.mark.parametrize(
    ("rule", "most", "found"),
    [
        ("patches", 64, (64, 64)),
        ("patches", 1024, (64, 64)),
        ("longest_side", 20, (20, 13)),
        ("keep", 1, (60, 40)),
    ],
)
def test_each_rule_gives_its_size(rule, most, found):
    pictures = {"rule": rule, "patch_size": 32, "max_side": most}
    assert size(images.resized(encode(noise(60, 40)), pictures)) == found


def test_no_side_is_shrunk_away():
    pictures = {"rule": "longest_side", "patch_size": 32, "max_side": 10}
    assert size(images.resized(encode(noise(500, 2)), pictures)) == (10, 1)


@pytest.mark.parametrize(
    ("kind", "written"), [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "PNG"), ("GIF", "PNG")]
)
def test_a_resized_picture_is_written_the_same_way_each_time(kind, written):
    encoded = encode(noise(60, 40), kind)
    once, again = images.resized(encoded, SOLO), images.resized(encoded, SOLO)
    assert once == again
    assert Image.open(io.BytesIO(once)).format == written


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_a_resized_picture_has_the_patches_of_its_original(mode):
    encoded = encode(noise(60, 40, mode))
    resized = images.resized(encoded, SOLO)
    np.testing.assert_array_equal(images.patches(encoded), images.patches(resized))


def test_patches_are_rows_of_channels_of_normalised_pixels():
    picture = noise(96, 64)
    found = images.patches(encode(picture))
    pixels = (np.asarray(picture) / 255 - np.array(images.MEAN)) / np.array(images.STD)
    assert found.shape == (6, 3 * 32 * 32)
    assert found.dtype == np.float32
    for row in range(2):
        for column in range(3):
            tile = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            np.testing.assert_allclose(found[row * 3 + column], tile.transpose(2, 0, 1).ravel(), atol=1e-6)


def test_sixteen_bits_of_grey_are_scaled_not_clipped():
    grey = Image.new("I;16", (32, 32), 40_000)
    value = images.patches(encode(grey))[0, 0] * images.STD[0] + images.MEAN[0]
    assert value == pytest.approx(40_000 / 65_535, abs=1 / 255)


def reason(encoded: bytes) -> str:
    with pytest.raises(RecordError) as caught:
        images.resized(encoded, SOLO)
    return caught.value.reason


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    empty = b"IDAT" + zlib.compress(b"")
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, empty)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header(width, height):
    assert reason(png_header(width, height)) == "too_many_pixels"


def test_a_hundred_million_pixels_are_not_too_many():
    assert reason(png_header(10_000, 10_000)) == "undecodable_picture"


@given(st.binary(max_size=200))
def test_other_bytes_are_no_picture(encoded):
    assert reason(encoded) == "undecodable_picture"


@pytest.mark.parametrize("encoded", [b"", b"ABC", b"\x89PNG and no more", b"II and no more", b"GIF8"])
def test_equal_damage_is_told_in_equal_words(encoded):
    """Pillow quotes the address of the buffer."""
    told = []
    for _ in range(2):
        with pytest.raises(RecordError) as caught:
            images.open_picture(encoded)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "object at" not in told[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_picture_cut_short_is_refused(kind):
    encoded = encode(noise(64, 64), kind)
    assert reason(encoded[: len(encoded) // 2]) == "undecodable_picture"


@given(st.data())
def test_damage_is_a_record_error_or_nothing(data):
    encoded = bytearray(
        encode(noise(8, 8), data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF"])))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        images.resized(bytes(encoded), SOLO)
    except RecordError as error:
        assert error.reason in {"undecodable_picture", "too_many_pixels"}  # noqa: PT017


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_resized_picture_keeps_the_tag_that_turns_it(kind):
    tags = Image.Exif()
    tags[0x0112] = 6
    out = io.BytesIO()
    noise(100, 40).save(out, kind, exif=tags)
    rule = {"rule": "longest_side", "patch_size": 32, "max_side": 50}

    smaller = images.resized(out.getvalue(), rule)

    assert Image.open(io.BytesIO(smaller)).size == (50, 20)
    assert Image.open(io.BytesIO(smaller)).getexif()[0x0112] == 6
    plain = images.resized(encode(noise(100, 40), kind), rule)
    assert 0x0112 not in Image.open(io.BytesIO(plain)).getexif()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("tag", "turned"),
    [
        ((1, 1, b"\6"), None),
        ((2, 2, b"6\0"), None),
        ((3, 1, b"\0\0"), None),
        ((3, 1, b"\6\0"), 6),
        ((4, 1, b"\xff\xff\xff\xff"), None),
        ((8, 1, b"\xff\xff"), None),
        ((11, 1, struct.pack("<f", 6)), 6),
    ],
    ids=["byte", "text", "0", "6", "large", "negative", "fraction"],
)
def test_a_tag_that_turns_nothing_is_left_out(kind, tag, turned):
    """As Pillow, and so transformers, read it: any number from 1 to 8, whatever its type."""
    number, count, value = tag
    entry = struct.pack("<HHHI", 1, 0x0112, number, count) + value.ljust(4, b"\0") + bytes(4)
    out = io.BytesIO()
    noise(100, 40).save(out, kind, exif=b"Exif\0\0II*\0\x08\0\0\0" + entry)
    rule = {"rule": "longest_side", "patch_size": 32, "max_side": 50}

    smaller = images.resized(out.getvalue(), rule)

    assert Image.open(io.BytesIO(smaller)).getexif().get(0x0112) == turned
    assert images.upright(smaller).size == ((20, 50) if turned else (50, 20))
    images.check_tags(out.getvalue())


@pytest.mark.parametrize("tags", [b"XX*\0\0\0\0\x08", b"I"], ids=["no TIFF", "cut short"])
def test_a_jpeg_that_decodes_and_whose_tags_do_not_is_a_rejected_record(tags):
    out = io.BytesIO()
    noise(100, 40).save(out, "JPEG", dpi=(72, 72))  # as its head tells, so that Pillow leaves tags for later
    head, content = out.getvalue()[:20], b"Exif\0\0" + tags
    encoded = head + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + out.getvalue()[20:]

    with pytest.raises(RecordError, match="tags of a picture cannot be read") as caught:
        images.resized(encoded, SOLO | {"max_side": 64})
    assert caught.value.reason == "undecodable_picture"
