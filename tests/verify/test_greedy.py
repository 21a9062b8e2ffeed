"""The trainer's own reading and model give, greedily, the tokens that transformers generates."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from plait.data.chat import Message, Picture, Sample, Text
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.report import answers
from plait.tokens.llava import LlavaRenderer
from plait.tokens.templates import chat_template
from plait.train.energon import PictureCollator, image_processor
from plait.verify import parity
from plait.verify.logits import Case, of_megatron
from plait.verify.ranks import run_ranks  # noqa: F401 - loaded before ranks are forked

STEPS = 6


def picture():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (33, 21, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2)], ids=str)
@pytest.mark.parametrize(("kind", "template"), [("clip", "llava"), ("siglip", "jp_alpaca")])
def test_the_same_picture_and_prompt_give_the_same_greedy_tokens(maker, grid, kind, template, tmp_path):
    source = maker.llava() if kind == "clip" else maker.llava("siglip", tower=maker.tower("siglip"))
    shards = maker.shards(source, grid.tp, grid.pp)
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(chat_template(template), encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(picture())
    served = answers.Model(tmp_path).ask("what?", str(tmp_path / "picture.png"), max_new_tokens=STEPS)
    expected = [token.id for token in served.tokens]

    form = {"template": template, "instruction": "keep", "language": "ja", "picture_tokens": 9}
    renderer = LlavaRenderer(maker.image, form)
    asked = Sample(
        (Message("user", (Picture(picture()), Text("\nwhat?"))), Message("assistant", (Text("."),)))
    )
    encoded = renderer.encode(asked)
    prompt = int(np.flatnonzero(encoded.trained)[0])
    batch = PictureCollator(prompt, fixed=True, processor=image_processor(shards))([encoded], renderer.pad_id)
    # One pass over prompt and answer: what is likeliest after each prefix is what greedy steps would write.
    spec, more = Spec.of(source), torch.tensor([expected[:-1]])
    ids = torch.cat((batch.input_ids, more), dim=1)
    rows = torch.cat((batch.picture_rows, torch.full_like(more, -1)), dim=1)
    case = Case("greedy", ids, torch.zeros_like(ids), batch.pictures, rows)
    logits = of_megatron(spec, grid, parity._Sharded(shards, grid), [case])[torch.float32][0]
    following = torch.as_tensor(logits)[0, prompt - 1 :]
    following[:, spec.image_token_id] = float("-inf")  # generation never writes a picture
    assert following.argmax(-1).tolist() == expected
