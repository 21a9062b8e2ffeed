"""Pictures: base64, checks before decoding, resizing, and SOLO's grid of patches.

A picture travels as its encoded bytes. They stay as they are unless a rule asks for another size: a JPEG
whose segments show that it is whole is then not even decoded.
Orientation tags are ignored here, so that a picture's grid follows from its stored size alone.

P = patch size, R = rows of patches, C = columns of patches

>>> patch_grid(640, 480)
(15, 20)
>>> patch_grid(4000, 3)
(1, 32)
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import pybase64

from plait.data import jpeg
from plait.data.resize import resize
from plait.errors import RecordError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Pixels = NDArray[np.uint8]

PATCH_SIZE = 32
MAX_RESOLUTION = 1024
MAX_PIXELS = 100_000_000
JPEG_QUALITY = 90
ORIENTATION, ORIENTATIONS = 0x0112, range(1, 9)
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
JPEGS = ("JPEG", "MPO")
"""Pillow's names of JPEG files; cameras put a second picture behind the first of an MPO."""
COLOURS = {"RGB": "RGBX", "L": "GRAY"}
"""simplejpeg's names of Pillow's modes that it decodes: torch resizes four values faster than three."""
ENCODED = {1: ("GRAY", "Gray"), 3: ("RGB", "420"), 4: ("RGBX", "420")}
"""simplejpeg's names of pixels of so many values, and of how their colours are stored."""
SIDES = ("min_width", "min_height")
EIGHTHS = 8
SCALES = (1, 2, 4)
"""Eighths of a JPEG's size that decoding at is quick for."""
MARGIN = 1.5
"""How much larger a decoded fraction is than the size to come: below it, both lose the same detail twice."""
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, ArithmeticError)
"""What Pillow's parsers raise on damaged bytes."""


# Base64


def url_json(encoded: bytes) -> bytes:
    """A picture file as a data URL with its true media type, as JSON has it: nothing has to be escaped."""
    kind, payload = media_type(encoded).encode(), pybase64.b64encode(encoded)
    return b"".join((b'"data:', kind, b";base64,", payload, b'"'))


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
    image = _opened(encoded)
    with _damage_told(encoded):
        image.load()
    return image


def _opened(encoded: bytes) -> "Image.Image":
    """A picture of which the head was read, and checked."""
    from PIL import Image

    with _damage_told(encoded):
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_pixels(*image.size)
    return image


@dataclass
class Opened:
    """A picture of which the head was read, by Pillow where its segments do not tell all: that takes longer.

    Attributes:
        encoded: its file.
        head: of a plain JPEG.
    """

    encoded: bytes
    head: jpeg.Head | None

    @classmethod
    def of(cls, encoded: bytes, head: jpeg.Head | None) -> "Opened":
        """Check a picture by its head, if there is one, or by Pillow.

        Raises:
            RecordError: it is of no known format, or too large.
        """
        plain = head if head and head.plain else None
        found = cls(encoded, plain)
        _check_pixels(*(plain.size if plain else found.image.size))
        return found

    @cached_property
    def image(self) -> "Image.Image":
        """The picture as Pillow opens it."""
        return _opened(self.encoded)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.head.size if self.head else self.image.size

    @property
    def jpeg_mode(self) -> str | None:
        """Pillow's name of a JPEG's colours; None if it is no JPEG."""
        if self.head:
            return self.head.mode
        return self.image.mode if self.image.format in JPEGS else None

    @property
    def orientation(self) -> int | None:
        """How it is turned, if a tag of it says so.

        Raises:
            RecordError: its tags are damaged.
        """
        if self.head:
            return None
        try:
            told = self.image.getexif().get(ORIENTATION)
        except DAMAGE as error:
            sentence = f"the tags of a picture cannot be read: {error}"
            raise RecordError(sentence, reason="undecodable_picture") from error
        return next((one for one in ORIENTATIONS if one == told), None)  # readers pass over what says nothing


@contextlib.contextmanager
def _damage_told(encoded: bytes) -> Iterator[None]:
    """What Pillow raises, as errors of a record."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise RecordError(f"picture is too large: {error}", reason="too_many_pixels") from error
    except UnidentifiedImageError as error:
        # Pillow's own sentence names an address in memory, another one in every run
        sentence = f"picture of {len(encoded)} bytes is none of {', '.join(FORMATS)}"
        raise RecordError(sentence, reason="undecodable_picture") from error
    except DAMAGE as error:
        sentence = f"picture of {len(encoded)} bytes cannot be decoded: {error}"
        raise RecordError(sentence, reason="undecodable_picture") from error


def _pixels(opened: Opened, scale: int = EIGHTHS) -> "Pixels":
    """The pixels of a picture, (Y, X, C): C is 1 where it is grey, 3, or 4, the last without meaning.

    Args:
        opened: the picture.
        scale: eighths of its size that a JPEG is decoded at, for a fraction of the work; rounded up.

    Raises:
        RecordError: it is damaged.
    """
    import numpy as np
    import simplejpeg

    colours = COLOURS.get(opened.jpeg_mode or "")
    if colours:
        sides = {name: -(-side * scale // EIGHTHS) for name, side in zip(SIDES, opened.size, strict=True)}
        # what this decoder does not take, or complains of, is for the other one to judge
        with contextlib.suppress(ValueError):
            return cast("Pixels", simplejpeg.decode_jpeg(opened.encoded, colours, **sides))
    image = opened.image
    with _damage_told(opened.encoded):
        image.load()
    flat = image if image.mode == "L" else _rgb(image)
    return np.array(flat, np.uint8).reshape(image.height, image.width, -1)


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
    opened = Opened.of(encoded, jpeg.head(encoded))
    if opened.head:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned = opened.image.getexif().get(ORIENTATION, 1) != 1
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
    rule, head = pictures["rule"], jpeg.head(encoded)
    if head and head.size == RULES[rule](*head.size, pictures) and head.is_whole(encoded):
        _check_pixels(*head.size)
        return encoded
    opened = Opened.of(encoded, head)
    width, height = opened.size
    size = RULES[rule](width, height, pictures)
    if size == opened.size:
        open_picture(encoded)
        return encoded
    scale = next((one for one in SCALES if _serves(opened.size, one, size)), EIGHTHS)
    pixels = _pixels(opened, scale)
    # the last pixels of a smaller one may stand beyond its edge; one that Pillow has decoded is no smaller
    extent = (width * scale / EIGHTHS, height * scale / EIGHTHS) if pixels.shape[1] < width else None
    return _encode(resize(pixels, size, KERNELS[rule], extent), opened)


def _serves(full: tuple[int, int], scale: int, size: tuple[int, int]) -> bool:
    """Whether so many eighths of a picture are a size, or enough larger to be shrunk to it."""
    sides = [(side * scale, EIGHTHS * wanted) for side, wanted in zip(full, size, strict=True)]
    return all(has == wanted for has, wanted in sides) or all(has >= MARGIN * wanted for has, wanted in sides)


KERNELS = {"patches": "bilinear", "longest_side": "bicubic"}
"""How pixels are weighed: for patches, as SOLO does."""


def _encode(pixels: "Pixels", source: Opened) -> bytes:
    """A picture file with the orientation tag of its source: who reads it turns it as before.

    Raises:
        RecordError: the tags of the source are damaged.
    """
    import simplejpeg
    from PIL import Image

    turned, tags = source.orientation, Image.Exif()
    if turned is not None:
        tags[ORIENTATION] = turned
    if source.jpeg_mode:
        found: bytes = simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, *ENCODED[pixels.shape[2]])
        return found if turned is None else jpeg.with_exif(found, tags.tobytes())
    out = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(out, "PNG", **({"exif": tags} if turned is not None else {}))
    return out.getvalue()


# Patches


def patches(
    encoded: bytes,
    *,
    patch_size: int = PATCH_SIZE,
    max_resolution: int = MAX_RESOLUTION,
    halves: bool = False,
) -> "NDArray[Any]":
    """The normalised patches of a picture, row by row: (R*C, 3*P*P), each in channel, y, x order.

    Args:
        encoded: a picture file.
        patch_size: side of a patch, in pixels.
        max_resolution: longest side of the picture, once resized, in pixels.
        halves: give float16, as they are stored, instead of float32.

    Raises:
        RecordError: the picture is damaged or too large.
    """
    import torch

    opened = Opened.of(encoded, jpeg.head(encoded))
    rows, columns = patch_grid(*opened.size, patch_size=patch_size, max_resolution=max_resolution)
    size = (columns * patch_size, rows * patch_size)
    pixels_YXC = torch.from_numpy(resize(_pixels(opened), size, KERNELS["patches"]))
    mean, std = (torch.tensor(one)[:, None, None] for one in (MEAN, STD))
    cut = pixels_YXC[:, :, :3].permute(2, 0, 1).contiguous().view(-1, rows, patch_size, columns, patch_size)
    values_NCYX = torch.empty((rows, columns, 3, patch_size, patch_size))
    values_NCYX.copy_(cut.permute(1, 3, 0, 2, 4)).div_(255).sub_(mean).div_(std)
    return values_NCYX.view(rows * columns, -1).to(torch.float16 if halves else torch.float32).numpy()


def in_whole_patches(encoded: bytes, *, patch_size: int, max_resolution: int) -> "Image.Image":
    """A picture at the size of its grid of patches, for eyes: resized by Pillow, for which nothing is loaded.

    Raises:
        RecordError: the picture is damaged or too large.
    """
    from PIL import Image

    image = open_picture(encoded)
    rows, columns = patch_grid(*image.size, patch_size=patch_size, max_resolution=max_resolution)
    return _rgb(image).resize((columns * patch_size, rows * patch_size), Image.Resampling.BILINEAR)


def unpatched(patches_NF: "NDArray[Any]", columns: int) -> "Image.Image":
    """The picture that :func:`patches` has cut and normalised, ``columns`` patches wide; back in 8 bits."""
    import numpy as np
    from PIL import Image

    side = round((patches_NF.shape[1] // 3) ** 0.5)
    cut = patches_NF.astype(np.float32).reshape(-1, columns, 3, side, side).transpose(0, 3, 1, 4, 2)
    pixels_YXC = cut.reshape(-1, columns * side, 3) * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    return Image.fromarray(np.clip(np.rint(pixels_YXC * 255), 0, 255).astype(np.uint8))
