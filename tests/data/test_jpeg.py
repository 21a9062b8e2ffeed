import io
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import cbook
from PIL import Image

from plait.data import images, jpeg
from plait.errors import RecordError

KEEP = {"rule": "keep", "patch_size": 32, "max_side": 1024}
BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
TAGS = Image.Exif()
TAGS[0x0112] = 6


def encode(mode="RGB", size=(40, 24), **keys):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **keys)
    return out.getvalue()


KINDS = {
    "quarter": encode(),
    "half": encode(subsampling=1),
    "full": encode(subsampling=0, quality=30),
    "grey": encode("L"),
    "restarts": encode(restart_marker_blocks=1),
    "tags": encode(exif=TAGS, comment="by hand"),
    "codes of its own": encode(optimize=True),
}


def whole(encoded):
    head = jpeg.head(encoded)
    return head is not None and head.is_whole(encoded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_known_by_its_segments_and_not_decoded(kind):
    encoded = KINDS[kind]
    assert jpeg.head(encoded).size == (40, 24)
    assert jpeg.head(encoded).plain == (kind != "tags")
    assert whole(encoded)
    with patch.object(images, "open_picture") as opened:
        assert images.resized(encoded, KEEP) is encoded
    assert not opened.called


OTHERS = {
    "progressive": encode(progressive=True),
    "four inks": encode("CMYK"),
    "cut": encode()[:-200],
    "no end": encode()[:-2],
    "more behind it": encode() + b"\x00",
    "another behind it": encode() + encode(),
    "no coefficients": encode()[:300],
    "no picture": b"\xff\xd8\xff\xd9",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_of_other_files_nothing_is_said(kind):
    assert not whole(OTHERS[kind])


def decodes(encoded):
    try:
        return images.open_picture(encoded).size == jpeg.head(encoded).size
    except RecordError:
        return False


@pytest.mark.parametrize("kind", KINDS)
def test_no_byte_of_a_head_can_be_another_so_that_a_whole_file_does_not_decode(kind):
    encoded = KINDS[kind]
    believed = 0
    for place in range(jpeg.head(encoded).coefficients):
        for value in {0, 1, 0x7F, 0xFF, encoded[place] ^ 1, encoded[place] ^ 0x80, encoded[place] ^ 0x10}:
            changed = encoded[:place] + bytes([value]) + encoded[place + 1 :]
            if whole(changed):
                believed += 1
                assert decodes(changed), (place, value)
                if (head := jpeg.head(changed)).plain:
                    assert images.upright(changed).size == head.size
                    with Image.open(io.BytesIO(changed)) as opened:
                        assert (opened.format, opened.mode) == ("JPEG", head.mode)
    assert believed > 100


@st.composite
def damaged(draw):
    """A file with some other bytes, of which a few may be gone."""
    encoded = bytearray(KINDS[draw(st.sampled_from(sorted(KINDS)))])
    for _ in range(draw(st.integers(1, 4))):
        encoded[draw(st.integers(0, len(encoded) - 1))] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(encoded)))
    del encoded[start : start + draw(st.sampled_from([0, 0, 1, 2, 50]))]
    return bytes(encoded)


@given(damaged())
@settings(max_examples=300)
def test_damage_is_seen_or_does_no_harm(encoded):
    assert not whole(encoded) or decodes(encoded)


@given(damaged() | st.sampled_from([*KINDS.values(), *OTHERS.values()]))
@settings(max_examples=300)
def test_pictures_are_the_same_whether_pillow_has_read_their_heads_or_not(encoded):
    def found(head):
        try:
            opened = images.Opened.of(encoded, head)
            return opened.size, opened.jpeg_mode, images._pixels(opened).tobytes(), opened.orientation
        except RecordError as error:
            return error.reason

    assert found(jpeg.head(encoded)) == found(None)


@pytest.mark.parametrize("kind", KINDS)
def test_pillow_reads_only_heads_with_more_in_them(kind):
    with patch.object(images, "_opened", wraps=images._opened) as opened:
        images.patches(KINDS[kind])
        images.resized(KINDS[kind], {"rule": "longest_side", "patch_size": 32, "max_side": 10})
    assert opened.call_count == (2 if kind == "tags" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_that_pillow_decodes(kind):
    """The exported processor decodes by Pillow."""
    encoded = KINDS[kind]
    found = images._pixels(images.Opened.of(encoded, jpeg.head(encoded)))
    assert np.array_equal(found[:, :, :3].squeeze(), np.asarray(Image.open(io.BytesIO(encoded))))


@pytest.mark.parametrize("size", [(1001, 779), (333, 1021), (900, 1111)])
@pytest.mark.parametrize("side", [120, 160, 300])
def test_a_photograph_that_is_decoded_smaller_is_nowhere_moved(size, side):
    """Stripes would show it: a fraction of a pixel makes them another grey."""
    y, x = np.mgrid[: size[1], : size[0]]
    stripes = np.sin(x / 9) + np.cos(y / 11)
    image = Image.fromarray(np.uint8(127 + 60 * stripes)).convert("RGB")
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    rule = {"rule": "longest_side", "patch_size": 32, "max_side": side}
    with patch.object(images, "_encode", lambda pixels, _: pixels):
        found = images.resized(out.getvalue(), rule)[:, :, :3]
    truth = image.resize(found.shape[1::-1], Image.Resampling.BICUBIC)
    assert np.abs(np.int16(found) - np.int16(truth)).mean() < 1.5


@pytest.mark.parametrize("longer", [600, 672, 700, 1000, 1344, 1400, 1900, 2050])
def test_a_photograph_is_nearly_as_sharp_as_one_that_was_decoded_whole(longer):
    """A fraction that is hardly larger than the size to come would lose 8 dB."""
    photograph = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    image = photograph.resize((round(longer * 0.85), longer), LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    rule = {"rule": "longest_side", "patch_size": 32, "max_side": 336}
    with patch.object(images, "_encode", lambda pixels, _: pixels):
        found = images.resized(out.getvalue(), rule)[:, :, :3]
    size, whole = found.shape[1::-1], Image.open(out)
    truth, other = (np.float64(whole.resize(size, kernel)) for kernel in (LANCZOS, BICUBIC))
    noises = [10 * np.log10(255**2 / np.square(pixels - truth).mean()) for pixels in (found, other)]
    assert noises[0] > noises[1] - 5.5
