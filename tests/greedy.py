"""The tokens that the trainer's own reading and model write greedily, to compare with transformers'."""

import io

import numpy as np
import torch
from PIL import Image

from plait.data.chat import Message, Picture, Sample, Text
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.train.energon import PictureCollator, image_processor
from plait.verify.cases import Case
from plait.verify.ours import of_megatron


def drawn_picture(seed=5):
    """A small png of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (33, 21, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def asked(picture, words=""):
    """A conversation as a data set has it, whose answer is not looked at."""
    return Sample(
        (Message("user", (Picture(picture), Text(f"\n{words}"))), Message("assistant", (Text("."),)))
    )


def trained_tokens(folder, load, grid, renderer, conversations):
    """What the Megatron model writes after each prefix of what was served, by the format of its training.

    One pass over prompt and answer: where it equals what was served, step by step it would be the same.

    Args:
        folder: a Megatron model or checkpoint, with the config and preprocessor that go along with it.
        load: loads a layer of a rank's from it.
        grid: its grid.
        renderer: of the format.
        conversations: pairs of a sample, the format's instruction in it, and the ids that transformers wrote.
    """
    spec, processor = Spec.of(folder, HF_CONFIG), image_processor(folder)
    pad = spec.pad_token_id
    read = [_case(renderer, processor, pad, *pair) for pair in conversations]
    logits, _ = of_megatron(spec, grid.tp, load, [case for case, _ in read])
    found = []
    for (_, prompt), one in zip(read, logits[torch.float32], strict=True):
        following = one[0, prompt - 1 :]
        following[:, spec.image_token_id] = float("-inf")  # generation never writes a picture
        found.append(following.argmax(-1).tolist())
    return found


def _case(renderer, processor, pad, sample, served):
    """Prompt and all but the last token of the answer, and the prompt's length."""
    encoded = renderer.encode(sample)
    prompt = int(np.flatnonzero(encoded.trained)[0])
    batch = PictureCollator(prompt, fixed=True, pad_id=pad, processor=processor)([encoded])
    more = torch.tensor([served[:-1]], dtype=torch.long)
    ids = torch.cat((batch.input_ids, more), dim=1)
    rows = torch.cat((batch.picture_rows, torch.full_like(more, -1)), dim=1)
    return Case("greedy", ids, torch.zeros_like(ids), batch.pictures, rows), prompt
