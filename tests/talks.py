"""Conversations about small pictures, and tars of them."""

import io
import tarfile

import numpy as np
from PIL import Image

from plait.data.chat import Message, Picture, Sample, Text

KEYS = {
    "layout": "conversations", "shard_name": "{:06d}.tar", "samples_per_shard": 4, "split": [9, 1, 0],
    "split_parts": {}, "exclude": "", "sample_type": None, "field_map": {}, "reject_limit": 0.01,
}  # fmt: skip


def picture(number=0, kind="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), number % 255, np.uint8)).save(file, kind)
    return Picture(file.getvalue())


def exchange(number, key=None):
    user = Message("user", (picture(number), Text(f"\nwhat is {number}?")))
    return Sample((user, Message("assistant", (Text(f"it is {number}"),))), key or f"s-{number}")


def noise(number):
    """A picture that no other number has."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)).save(file, "PNG")
    return Picture(file.getvalue())


def asked(number, parts):
    """An exchange that begins with none to three parts: a picture, a line break, another picture."""
    shown = [noise(number), Text("\n"), noise(number + 1)][:parts]
    user = Message("user", (*shown, Text(f"what is {number}?")))
    return Sample((user, Message("assistant", (Text(f"it is {number % 7}"),))), f"s{number}")


def talk(number):
    """Two pictures, two exchanges."""
    first = Message("user", (Text("look: "), picture(number), Text(" and "), picture(number + 1, "PNG")))
    answer, more = Message("assistant", (Text("seen"),)), Message("user", (Text("sure?"),))
    return Sample((first, answer, more, answer), f"t-{number}")


def tar_of(path, samples):
    """A tar as anyone may have written it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for name, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


STORY = (
    "A small boat left the harbour before dawn, and nobody on the quay had seen who was rowing it. "
    "The keeper of the lighthouse wrote the hour into his book, as he had done for thirty years, and "
    "went to sleep. When he woke the boat lay at its mooring again, wet to the gunwale."
)
