"""SOLO's processor: pictures and text to ids, patches, and where the patches stand.

A picture becomes ``<vision>``, its patches row by row with ``<vrow_sep>`` before every row but the
first, ``</vision>``. Text before, between and after pictures is tokenised piece by piece, as it was
in training.
"""

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

MEAN = np.float32((0.485, 0.456, 0.406))
STD = np.float32((0.229, 0.224, 0.225))
PICTURE = "<image>"


class SoloProcessor(ProcessorMixin):
    """Prepares pictures and text for SOLO.

    Args:
        tokenizer: SOLO's tokenizer.
        patch_size: side of a patch, in pixels.
        max_resolution: longest side of a picture after resizing, in pixels.
    """

    def __init__(self, tokenizer=None, patch_size=32, max_resolution=1024, chat_template=None, **kwargs):
        self.patch_size = patch_size
        self.max_resolution = max_resolution
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "vision_patches", "vision_patch_indices"]

    def __call__(self, images=None, text=None, bos=False, **kwargs):
        """Prepare a batch.

        Args:
            images: a PIL picture, a list of them for one text, or a list of lists, one a text.
            text: a text or a list of texts; each ``<image>`` in it is replaced by the next picture. A
                text without any has its pictures in front.
            bos: whether each sequence starts with the beginning-of-sequence token.

        Returns:
            input_ids, attention_mask and vision_patch_indices [b, s], padded on the left, and
            vision_patches [n, 3 * patch_size^2], where there are pictures.

        Raises:
            ValueError: the pictures and the ``<image>`` marks of a text differ in number.
        """
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        pictures = _by_text(images, len(texts))
        rows, patches = [], []
        for one, shown in zip(texts, pictures, strict=True):
            ids, places = self._sequence(one, shown, patches, bos)
            rows.append((ids, places))
        return BatchFeature(_padded(rows, patches, self._pad_id()))

    def patch_grid(self, width, height):
        """Rows and columns of the patches of a picture."""
        side, long, short = self.patch_size, max(width, height), min(width, height)
        longer = min(-(-long // side), max(self.max_resolution // side, 1))
        shorter = max(-(-(longer * side * short // long) // side), 1)
        return (longer, shorter) if height > width else (shorter, longer)

    def patches(self, picture):
        """The normalised patches [rows * columns, 3 * side * side] of a picture, and its grid."""
        side = self.patch_size
        rows, columns = self.patch_grid(*picture.size)
        size = (columns * side, rows * side)
        flat = _rgb(picture)
        flat = flat if flat.size == size else flat.resize(size, Image.Resampling.BILINEAR)
        pixels = (np.asarray(flat, dtype=np.float32) / 255 - MEAN) / STD
        cut = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        return torch.from_numpy(np.ascontiguousarray(cut.reshape(rows * columns, -1))), (rows, columns)

    def _sequence(self, text, pictures, patches, bos):
        """Ids and patch indices of one text; the patches of its pictures are appended to ``patches``."""
        parts = text.split(PICTURE)
        if len(parts) == 1:
            parts = [""] * len(pictures) + parts
        if len(parts) - 1 != len(pictures):
            raise ValueError(f"a text has {len(parts) - 1} {PICTURE} marks and {len(pictures)} pictures")
        ids = [self.tokenizer.bos_token_id] if bos else []
        places = [-1] * len(ids)
        for number, part in enumerate(parts):
            if number:
                self._add_picture(pictures[number - 1], patches, ids, places)
            if part:
                ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
            places += [-1] * (len(ids) - len(places))
        return ids, places

    def _add_picture(self, picture, patches, ids, places):
        values, (rows, columns) = self.patches(picture)
        first = sum(len(earlier) for earlier in patches)
        patches.append(values)
        begin, patch, between, end = (
            self.tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("vision", "vpatch", "vrow_sep", "/vision")
        )
        ids.append(begin)
        places.append(-1)
        for row in range(rows):
            if row:
                ids.append(between)
                places.append(-1)
            ids.extend([patch] * columns)
            places.extend(range(first + row * columns, first + (row + 1) * columns))
        ids.append(end)
        places.append(-1)

    def _pad_id(self):
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def batch_decode(self, *args, **kwargs):
        """The tokenizer's own."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        """The tokenizer's own."""
        return self.tokenizer.decode(*args, **kwargs)


def _by_text(images, texts):
    if images is None:
        return [[] for _ in range(texts)]
    if isinstance(images, Image.Image):
        images = [images]
    if texts == 1 and not (images and isinstance(images[0], (list, tuple))):
        images = [images]
    if len(images) != texts:
        raise ValueError(f"{texts} texts and pictures for {len(images)}: give one list of pictures a text")
    return [list(shown) for shown in images]


def _rgb(picture):
    if picture.mode.startswith("I;16"):
        return picture.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    return picture.convert("RGB")


def _padded(rows, patches, pad):
    length = max(len(ids) for ids, _ in rows)
    found = {
        "input_ids": torch.tensor([[pad] * (length - len(ids)) + ids for ids, _ in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
        "vision_patch_indices": torch.tensor([[-1] * (length - len(ids)) + places for ids, places in rows]),
    }
    return {**found, "vision_patches": torch.cat(patches)} if patches else found


__all__ = ["SoloProcessor"]
