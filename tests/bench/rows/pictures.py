"""Pictures: JPEG files to the lines of chat records, and to SOLO's patches.

The photograph is matplotlib's sample picture, recut: tiles of it, mirrored, brighter or darker, fill those
of the asked longer side; the other side differs from seed to seed. It is enlarged first, for a pixel of a
camera's 2,048 is not as sharp as one of a picture made small.
"""

import base64
import io
import json
import time
import warnings
from functools import cache, partial
from unittest.mock import patch

import numpy as np
from PIL.Image import Resampling

from tests.bench.harness import Own, Row

BICUBIC, LANCZOS = Resampling.BICUBIC, Resampling.LANCZOS
KEPT = {"rule": "keep", "patch_size": 32, "max_side": 1024}
ENLARGED = 2
SHORTER = 0.6, 0.9
"""The shorter side of a photograph, of the longer one."""
BEHIND = 0.5
"""dB that a picture, as it was written, may be behind the peer's."""
ABOUT = 0.1
"""How far the longer side is from the one that a row names."""


@cache
def photograph():
    """Pixels (Y, X, 3) of a real one."""
    from matplotlib import cbook
    from PIL import Image

    image = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    size = [round(length * ENLARGED) for length in image.size]
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def recut(width, height, draw):
    """A photograph of this size."""
    pixels_YXC, tile = np.empty((height, width, 3), np.uint8), 900
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = (int(draw.integers(0, size - tile)) for size in photograph().shape[:2])
            part = photograph()[y : y + tile, x : x + tile][:, :: draw.choice([1, -1])]
            shade = np.clip(part * draw.uniform(0.6, 1.2), 0, 255).astype(np.uint8)
            room = pixels_YXC[top : top + tile, left : left + tile]
            room[:] = shade[: room.shape[0], : room.shape[1]]
    return pixels_YXC


def jpegs(folder, seed, *, side, count, about=0.0):
    """Photographs whose longer side is so long, or about so."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    for number in range(count):
        longer = round(side * draw.uniform(1 - about, 1 + about))
        size = longer, int(longer * draw.uniform(*SHORTER))
        Image.fromarray(recut(*size[:: draw.choice([1, -1])], draw)).save(
            folder / f"{number:04d}.jpg", quality=90
        )


def files(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


# To records


def recorded(source, target, pictures):
    """Ours: what `plait chat` does with the pictures of a line."""
    from plait.data import chat, images

    def line(encoded):
        parts = (chat.Picture(encoded), chat.Text("a photograph"))
        sample = chat.Sample((chat.Message("assistant", parts),), "x")
        return sample.with_pictures(partial(images.resized, pictures=pictures)).to_line()

    return lined(source, target, line)


def by_pillow(source, target, side=None):
    """As scripts of the field do: open, resize, save; base64 and json of the standard library."""
    from PIL import Image

    def line(encoded):
        if side:
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            scale = side / max(image.size)
            size = [round(length * scale) for length in image.size]
            file = io.BytesIO()
            image.resize(size, BICUBIC).save(file, "JPEG", quality=90)
            encoded = file.getvalue()
        url = "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a photograph"}]
        record = {"id": "x", "messages": [{"role": "assistant", "content": parts}]}
        return json.dumps(record).encode()

    return lined(source, target, line)


def lined(source, target, line):
    """Pictures to lines, three times over; neither reading nor writing is timed."""
    encoded = files(source)
    before = time.process_time()
    for one in encoded * 3:
        line(one)
    seconds = time.process_time() - before
    lines = map(line, encoded)
    (target / "out.jsonl").write_bytes(b"".join(one + b"\n" for one in lines))
    return Own(seconds)


def noise_db(pixels, truth):
    """Peak signal to noise ratio in dB."""
    squares = np.square(np.asarray(pixels, np.float64) - np.asarray(truth, np.float64)).mean()
    return 10 * np.log10(255**2 / squares)


def faithful(source, ours, peer, *, pictures, least=None):
    """PSNR to Lanczos of the pixels to be encoded: of a round's pictures, so much, or as much as Pillow's.

    So much is for pixels: JPEG at this quality leaves 32 to 40 dB of Lanczos itself. What stands in the files
    is held to what stands in the peer's.
    """
    from PIL import Image

    from plait.data import images

    found, others, files_of = [], [], zip(written(ours), written(peer), strict=True)
    for encoded, both in zip(files(source), files_of, strict=True):
        with patch.object(images, "_encode", lambda pixels, _: pixels):
            mine = images.resized(encoded, pictures)[:, :, :3]
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        truth, other = (image.resize(mine.shape[1::-1], kernel) for kernel in (LANCZOS, BICUBIC))
        found.append([noise_db(one, truth) for one in (mine, both[0])])
        others.append([noise_db(one, truth) for one in (other, both[1])])
    (pixels, in_files), (pixels_of_peer, in_files_of_peer) = np.transpose(found), np.transpose(others)
    needed = least or pixels_of_peer.mean() - 0.1
    assert pixels.mean() >= needed, f"PSNR {pixels.mean():.2f}, at least {needed:.2f} is asked for"
    behind = (in_files_of_peer - in_files).max()
    assert behind < BEHIND, f"a picture's PSNR, as it was written, is {behind:.2f} dB less than the peer's"
    return (
        f"PSNR {pixels.mean():.1f}, least {pixels.min():.1f}, the peer's {pixels_of_peer.mean():.1f}; "
        f"{in_files.mean():.1f} in files, the peer's {in_files_of_peer.mean():.1f}"
    )


def written(folder):
    """The pixels of the pictures in a file of records."""
    from PIL import Image

    for line in (folder / "out.jsonl").open():
        url = json.loads(line)["messages"][0]["content"][0]["image_url"]["url"]
        encoded = base64.b64decode(url.partition(",")[2])
        yield np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def unchanged(source, ours, peer):
    assert (ours / "out.jsonl").stat().st_size < (peer / "out.jsonl").stat().st_size
    lines = [[json.loads(line) for line in (one / "out.jsonl").open()] for one in (ours, peer)]
    assert lines[0] == lines[1]
    megabytes = sum(map(len, files(source))) / 1e6
    return f"{megabytes:.0f} MB of pictures"


def loaded():
    """Modules that both sides import when they begin."""
    from plait.data import chat, images

    images.resized(small(), {**KEPT, "rule": "longest_side", "max_side": 336})
    images.resized(small(), KEPT)
    chat.Picture(b"\xff\xd8").to_json()


def loaded_to_cut():
    """What patches are cut with."""
    from plait.data import images

    images.patches(small())


def small():
    """A picture to begin with."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(recut(700, 500, np.random.default_rng(0))).save(file, "JPEG")
    return file.getvalue()


def shrinking(name, *, side, to, count, target, least=None, about=ABOUT):
    """A row of photographs made smaller."""
    pictures = {**KEPT, "rule": "longest_side", "max_side": to}
    return Row(
        name,
        target=target,
        make=partial(jpegs, side=side, count=count, about=about),
        ours=partial(recorded, pictures=pictures),
        peer=partial(by_pillow, side=to),
        check=partial(faithful, pictures=pictures, least=least),
        warm=loaded,
    )


# To patches


def patched(source, target, *, halves):
    """Ours: halves, as `plait index` writes them, or what training is given of encoded pictures."""
    from plait.data import images

    return cut(source, target, partial(images.patches, halves=halves))


def listed(source, target):
    """As the original, which makes one tensor of a list of patches."""
    import torch

    warnings.filterwarnings("ignore", "Creating a tensor from a list of numpy.ndarrays is extremely slow")
    return cut(source, target, lambda encoded: torch.HalfTensor(one_patch_at_a_time(encoded)).numpy())


def stacked(source, target):
    """Not as the original: its patches are one array before they are a tensor."""
    import torch

    def together(encoded):
        return torch.from_numpy(np.stack(one_patch_at_a_time(encoded))).half().numpy()

    return cut(source, target, together)


def cut(source, target, work):
    """Pictures to patches; neither reading nor writing is timed."""
    encoded = files(source)
    before = time.process_time()
    for one in encoded:
        work(one)
    seconds = time.process_time() - before
    with (target / "out.bin").open("wb") as out:
        for one in encoded:
            out.write(work(one).data)
    return Own(seconds)


def one_patch_at_a_time(encoded):
    """With PIL and torch, each patch is cut out, made a tensor and normalised; a list of them."""
    import torch
    from PIL import Image

    from plait.data.images import MEAN, STD, patch_grid

    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    rows, columns = patch_grid(*image.size)
    image = image.resize((columns * 32, rows * 32), Image.Resampling.BILINEAR)
    found = []
    for row in range(rows):
        for column in range(columns):
            box = (column * 32, row * 32, column * 32 + 32, row * 32 + 32)
            pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1) / 255
            found.append(((pixels - mean) / std).flatten().numpy())
    return found


def near(source, ours, peer, *, halves):
    mine = np.fromfile(ours / "out.bin", np.float16 if halves else np.float32)
    theirs = np.fromfile(peer / "out.bin", np.float16)
    assert mine.shape == theirs.shape
    away = np.abs(mine.astype(np.float32) - theirs.astype(np.float32))
    assert away.mean() < 0.005, f"mean difference {away.mean():.4f}"
    assert away.max() < 0.5, f"greatest difference {away.max():.3f}"
    return f"mean difference {away.mean():.4f}, greatest {away.max():.3f}"


def patching(name, *, halves, peer=listed, target=40):
    """A row of patches."""
    ours, check = partial(patched, halves=halves), partial(near, halves=halves)
    return Row(name, target, partial(jpegs, side=640, count=20), ours, peer, check, loaded_to_cut)


ROWS = [
    shrinking("photos-2048-to-336", side=2048, to=336, count=4, target=3, least=39),
    shrinking("photos-2048-to-1024", side=2048, to=1024, count=6, target=3, least=44, about=0),
    shrinking("photos-about-2048-to-1024", side=2048, to=1024, count=6, target=3, least=44),
    shrinking("photos-640-to-336", side=640, to=336, count=40, target=1.8),
    Row(
        "pictures-kept",
        target=4,
        make=partial(jpegs, side=640, count=60),
        ours=partial(recorded, pictures=KEPT),
        peer=by_pillow,
        check=unchanged,
        warm=loaded,
    ),
    patching("solo-patches-halves", halves=True),
    patching("solo-patches-floats", halves=False),
    patching("solo-patches-stacked", halves=True, peer=stacked, target=None),
]
