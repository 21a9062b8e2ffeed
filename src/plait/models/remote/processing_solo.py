"""SOLO's processor: pictures and text to ids, patches, and where the patches stand.

A picture becomes ``<vision>``, its patches row by row with ``<vrow_sep>`` before every row but the
first, ``</vision>``. Pictures are marked in a text in one of two ways, as the model was trained:

- by ``<image>``: each text between pictures is tokenised by itself, and is plain text throughout
  (pretraining);
- by ``<vision></vision>``, as the chat template writes them: the text is tokenised as a whole.

A text without a mark has its pictures in front, as in pretraining; without pictures it is tokenised
as a whole.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import BatchFeature, ProcessorMixin

MEAN = np.float32((0.485, 0.456, 0.406))
STD = np.float32((0.229, 0.224, 0.225))
PICTURE = "<image>"
PICTURE_IN_CHAT = "<vision></vision>"


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
            text: a text or a list of texts; each mark in it is replaced by the next picture.
            bos: whether each sequence starts with the beginning-of-sequence token.

        Returns:
            input_ids, attention_mask and vision_patch_indices [b, s], padded on the left, and
            vision_patches [n, 3 * patch_size^2], where there are pictures.

        Raises:
            ValueError: the pictures and the marks of a text differ in number.
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
        pixels = (np.float32(_resized(_rgb(picture), size)) / 255 - MEAN) / STD
        cut = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        return torch.from_numpy(np.ascontiguousarray(cut.reshape(rows * columns, -1))), (rows, columns)

    def _sequence(self, text, pictures, patches, bos):
        """Ids and patch indices of one text; the patches of its pictures are appended to ``patches``."""
        first = sum(len(earlier) for earlier in patches)
        shown = []
        for picture in pictures:
            values, (rows, columns) = self.patches(picture)
            patches.append(values)
            shown.append("<vision>" + "<vrow_sep>".join(["<vpatch>" * columns] * rows) + "</vision>")
        ids = [self.tokenizer.bos_token_id] if bos else []
        chat = PICTURE_IN_CHAT in text
        ids += self._apart(text, shown) if PICTURE in text or (shown and not chat) else self._whole(text, shown)
        places = np.full(len(ids), -1)
        found = np.flatnonzero(np.array(ids) == self.tokenizer.convert_tokens_to_ids("<vpatch>"))
        if len(found) != sum(len(values) for values in patches) - first:
            raise ValueError("a text holds <vpatch> itself; only pictures may")
        places[found] = np.arange(first, first + len(found))
        return ids, places.tolist()

    def _whole(self, text, shown):
        parts = _between(text.split(PICTURE_IN_CHAT), shown, PICTURE_IN_CHAT)
        return self.tokenizer("".join(parts), add_special_tokens=False)["input_ids"]

    def _apart(self, text, shown):
        parts = text.split(PICTURE)
        parts = [""] * len(shown) + parts if len(parts) == 1 else parts
        ids = []
        for number, part in enumerate(_between(parts, shown, PICTURE)):
            if part:
                plain = number % 2 == 0
                ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids

    def _pad_id(self):
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def batch_decode(self, *args, **kwargs):
        """The tokenizer's own."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        """The tokenizer's own."""
        return self.tokenizer.decode(*args, **kwargs)


def _between(parts, shown, mark):
    """Texts and pictures in turn."""
    if len(parts) - 1 != len(shown):
        raise ValueError(f"a text has {len(parts) - 1} marks {mark} and {len(shown)} pictures")
    return [piece for pair in zip(parts, [*shown, ""], strict=True) for piece in pair]


def _resized(picture, size):
    """The pixels [y, x, 3] of a picture made so wide and high; torch's are those of training to the last bit."""
    pixels = np.array(picture)
    if picture.size == size:
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found = interpolate(planes, size[::-1], mode="bilinear", align_corners=False, antialias=True)
    return found[0].permute(1, 2, 0).numpy()


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
