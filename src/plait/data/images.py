"""Pictures: base64, checks before decoding, resizing, and SOLO's grid of patches.

A picture travels as its encoded bytes. They stay as they are unless a rule asks for another size.
Orientation tags are ignored here, so that a picture's grid follows from its stored size alone.

P = patch size, R = rows of patches, C = columns of patches

>>> patch_grid(640, 480)
(15, 20)
>>> patch_grid(4000, 3)
(1, 32)
"""

import io
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pybase64

from plait.errors import RecordError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

PATCH_SIZE = 32
MAX_RESOLUTION = 1024
MAX_PIXELS = 100_000_000
JPEG_QUALITY = 90
ORIENTATION = 0x0112
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II": "image/tiff",
    b"MM": "image/tiff",
}
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, ArithmeticError)
"""What Pillow's parsers raise on damaged bytes."""


# Base64


def to_url(encoded: bytes) -> str:
    """A picture file as a data URL with its true media type."""
    return f"data:{media_type(encoded)};base64,{pybase64.b64encode(encoded).decode('ascii')}"


def from_url(url: str) -> bytes:
    """The picture file inside a data URL.

    Raises:
        RecordError: the URL is not a base64 data URL (``not_base64``).
    """
    head, comma, payload = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith("base64")):
        raise RecordError(f"image_url is not a base64 data URL: {url[:60]!r}", reason="not_base64")
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError as error:
        raise RecordError(f"image_url is not base64: {error}", reason="not_base64") from error


def media_type(encoded: bytes) -> str:
    """The media type that a picture file's first bytes say."""
    found = (kind for magic, kind in MAGIC.items() if encoded.startswith(magic))
    return next(found, "application/octet-stream")


# Decoding


def open_picture(encoded: bytes) -> "Image.Image":
    """Decode a picture, its size having been checked before its pixels are.

    Raises:
        RecordError: it is not a whole picture of a known format (``undecodable_picture``), or has
            more than 100 million pixels (``too_many_pixels``).
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            _check_pixels(*image.size)
            image.load()
    except Image.DecompressionBombError as error:
        raise RecordError(f"picture is too large: {error}", reason="too_many_pixels") from error
    except UnidentifiedImageError as error:
        # Pillow's own sentence names an address in memory, another one in every run
        sentence = f"picture of {len(encoded)} bytes is none of {', '.join(FORMATS)}"
        raise RecordError(sentence, reason="undecodable_picture") from error
    except DAMAGE as error:
        sentence = f"picture of {len(encoded)} bytes cannot be decoded: {error}"
        raise RecordError(sentence, reason="undecodable_picture") from error
    return image


def upright(encoded: bytes) -> "Image.Image":
    """A picture as transformers opens those of a chat: in RGB, turned as its camera was held.

    Raises:
        RecordError: it is no picture.
    """
    from PIL import ImageOps

    opened = open_picture(encoded)
    try:
        return ImageOps.exif_transpose(opened).convert("RGB")
    except DAMAGE as error:
        sentence = f"the tags of a picture of {len(encoded)} bytes cannot be read: {error}"
        raise RecordError(sentence, reason="undecodable_picture") from error


def check_tags(encoded: bytes) -> None:
    """Find what would keep a picture that decodes from being turned upright; few have such tags at all.

    Raises:
        RecordError: its tags are damaged.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ORIENTATION, 1) != 1
    except DAMAGE:
        turned = True
    if turned:
        upright(encoded)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        sentence = f"picture has {width} x {height} pixels, more than {MAX_PIXELS:,}"
        raise RecordError(sentence, reason="too_many_pixels")


def _rgb(image: "Image.Image") -> "Image.Image":
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    return image.convert("RGB")


# Resizing


def patch_grid(
    width: int, height: int, *, patch_size: int = PATCH_SIZE, max_resolution: int = MAX_RESOLUTION
) -> tuple[int, int]:
    """Rows and columns of the patches of a picture, as SOLO counts them.

    The longer side grows to a whole number of patches, at most ``max_resolution``; the shorter
    follows its share of it and grows likewise. No side has less than one patch.
    """
    long, short = max(width, height), min(width, height)
    most = max(max_resolution // patch_size, 1)
    longer = min(-(-long // patch_size), most)
    shorter = max(-(-(longer * patch_size * short // long) // patch_size), 1)
    return (longer, shorter) if height > width else (shorter, longer)


def _whole_patches(width: int, height: int, pictures: Mapping[str, Any]) -> tuple[int, int]:
    size = pictures["patch_size"]
    rows, columns = patch_grid(width, height, patch_size=size, max_resolution=pictures["max_side"])
    return columns * size, rows * size


def _shrunk(width: int, height: int, pictures: Mapping[str, Any]) -> tuple[int, int]:
    long, most = max(width, height), pictures["max_side"]
    if long <= most:
        return width, height
    return max(round(width * most / long), 1), max(round(height * most / long), 1)


def _kept(width: int, height: int, pictures: Mapping[str, Any]) -> tuple[int, int]:  # noqa: ARG001
    return width, height


RULES: dict[str, Callable[[int, int, Mapping[str, Any]], tuple[int, int]]] = {
    "keep": _kept,
    "patches": _whole_patches,
    "longest_side": _shrunk,
}
"""Width and height that each rule of ``config: pictures`` gives a picture."""


def resized(encoded: bytes, pictures: Mapping[str, Any]) -> bytes:
    """Check a picture and give it the size its rule asks for; the same bytes if it has that size.

    Args:
        encoded: a picture file.
        pictures: ``rule``, ``patch_size`` and ``max_side``, as ``datasets.*.pictures`` has them.

    Raises:
        RecordError: the picture is damaged or too large.
    """
    image = open_picture(encoded)
    size = RULES[pictures["rule"]](*image.size, pictures)
    return encoded if size == image.size else _encode(_resize(image, size), image)


def _resize(image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    from PIL.Image import Resampling

    flat = image if image.mode == "L" else _rgb(image)
    return flat.resize(size, Resampling.BILINEAR)


def _encode(image: "Image.Image", source: "Image.Image") -> bytes:
    """A picture file with the orientation tag of its source: who reads it turns it as before."""
    from PIL import Image

    exif, turned = Image.Exif(), source.getexif().get(ORIENTATION)
    if turned is not None:
        exif[ORIENTATION] = turned
    out = io.BytesIO()
    if source.format == "JPEG":
        image.save(out, "JPEG", quality=JPEG_QUALITY, exif=exif)
    else:
        image.save(out, "PNG", **({"exif": exif} if turned is not None else {}))
    return out.getvalue()


# Patches


def patches(
    encoded: bytes, *, patch_size: int = PATCH_SIZE, max_resolution: int = MAX_RESOLUTION
) -> "NDArray[np.float32]":
    """The normalised patches of a picture, row by row: (R*C, 3*P*P), each in channel, y, x order.

    Raises:
        RecordError: the picture is damaged or too large.
    """
    import numpy as np

    image = open_picture(encoded)
    rows, columns = patch_grid(*image.size, patch_size=patch_size, max_resolution=max_resolution)
    size = (columns * patch_size, rows * patch_size)
    flat = _rgb(image)
    pixels_YXC: NDArray[Any] = np.asarray(
        flat if flat.size == size else _resize(flat, size), dtype=np.float32
    )
    pixels_YXC = (pixels_YXC / np.float32(255) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    cut = pixels_YXC.reshape(rows, patch_size, columns, patch_size, 3)
    patches_NCYX = cut.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1)
    return np.ascontiguousarray(patches_NCYX, dtype=np.float32)


def unpatched(patches_NF: "NDArray[Any]", columns: int) -> "Image.Image":
    """The picture that :func:`patches` has cut and normalised, ``columns`` patches wide; back in 8 bits."""
    import numpy as np
    from PIL import Image

    side = round((patches_NF.shape[1] // 3) ** 0.5)
    cut = patches_NF.astype(np.float32).reshape(-1, columns, 3, side, side).transpose(0, 3, 1, 4, 2)
    pixels_YXC = cut.reshape(-1, columns * side, 3) * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    return Image.fromarray(np.clip(np.rint(pixels_YXC * 255), 0, 255).astype(np.uint8))
