"""What the trainer sees is what the exported processor gives: ids and pixels; only answers are trained."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from folders import tokenizer_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import DataError, RecordError
from plait.models.build import build
from plait.tokens import instructions
from plait.tokens.llava import LlavaRenderer, pixels
from plait.tokens.templates import HEADER, chat_template

RECIPES = {"llava": "clip", "jp_alpaca": "siglip"}
FORM = {"instruction": "keep", "language": "ja", "picture_tokens": 16}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12)


def picture(number):
    noise = np.random.default_rng(number).integers(0, 255, (40 + number, 60, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return Picture(file.getvalue())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By template: a renderer, and the processor of a model folder as an export has it."""
    root = tmp_path_factory.mktemp("llava")
    tokenizer = tokenizer_folder(root / "tokenizer", image=True)
    found = {}
    for template, kind in RECIPES.items():
        base, tower, model = (root / f"{part}-{kind}" for part in ("base", "tower", "model"))
        side = {"clip": 32, "siglip": 38}[kind]
        sizes = {"image_size": side, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2}
        for folder, source, parts in (
            (base, {"kind": "init", "tokenizer": "t", "num_hidden_layers": 1}, [tokenizer]),
            (tower, {"kind": "init_tower", "architecture": kind, **sizes}, []),
            (
                model,
                {"kind": "llava", "base": "b", "vision": "v", "tokenizer": "t"},
                [base, tower, tokenizer],
            ),
        ):
            folder.mkdir()
            build(folder, source, parts)
        (model / "chat_template.jinja").write_text(chat_template(template), encoding="utf-8")
        renderer = LlavaRenderer(tokenizer, {**FORM, "template": template})
        found[template] = renderer, AutoProcessor.from_pretrained(model), model
    return found


def conversation(texts, pictures):
    """Users' turns with pictures, an answer to each."""
    messages = []
    for number, (question, answer) in enumerate(texts):
        seen = pictures if number == 0 else []
        messages.append(Message("user", (*seen, Text(f"\n{question}"))))
        messages.append(Message("assistant", (Text(answer),)))
    return Sample(tuple(messages), "key")


def as_hf(sample):
    """The messages that a user gives to ``apply_chat_template``."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part.text}
                for part in message.parts
            ],
        }
        for message in sample.messages
    ]


def opened(sample):
    return [Image.open(io.BytesIO(encoded)).convert("RGB") for encoded in sample.pictures]


@pytest.mark.parametrize("template", RECIPES)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), count=st.integers(0, 2))
def test_seed_17_the_trainer_sees_the_ids_of_the_exported_processor(made, template, texts, count):
    renderer, processor, _ = made[template]
    sample = conversation(texts, [picture(number) for number in range(count)])
    text = processor.apply_chat_template(as_hf(sample), tokenize=False)
    images = opened(sample) or None
    expected = processor(text=text, images=images, add_special_tokens=False, return_tensors="np")
    encoded = renderer.encode(sample)
    assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
    stands = encoded.input_ids == renderer.image_id
    assert encoded.picture_rows[stands].tolist() == list(range(16 * count))
    assert (encoded.picture_rows[~stands] == -1).all()


@pytest.mark.parametrize("template", RECIPES)
def test_seed_17_the_trainer_sees_the_pixels_of_the_exported_processor(made, template):
    _, processor, model = made[template]
    sample = conversation([("what?", "this")], [picture(3), picture(4)])
    ours = pixels(sample.pictures, AutoImageProcessor.from_pretrained(model))
    text = processor.apply_chat_template(as_hf(sample), tokenize=False)
    theirs = processor(text=text, images=opened(sample), return_tensors="np")["pixel_values"]
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("template", RECIPES)
def test_only_answers_and_their_ends_are_trained(made, template):
    renderer, _, _ = made[template]
    encoded = renderer.encode(conversation([("one", "first"), ("two", "second")], [picture(0)]))
    trained = renderer._tokenizer.decode(
        encoded.input_ids[encoded.trained].tolist(), skip_special_tokens=False
    )
    space = " " if template == "llava" else ""
    assert trained == f"{space}first</s>{space}second</s>"


def test_the_texts_are_those_of_the_guides(made):
    sample = conversation([("何色?", "赤")], [picture(0)])
    written = {
        name: renderer._tokenizer.decode(
            renderer.encode(sample).input_ids.tolist(), skip_special_tokens=False
        ).replace("<image>" * 16, "<image>")
        for name, (renderer, _, _) in made.items()
    }
    assert written["llava"] == "<s>[INST] <image>\n何色?[/INST] 赤</s>"
    assert written["jp_alpaca"] == f"<s>{HEADER}\n\n### 指示:\n<image>\n何色?\n\n### 応答:\n赤</s>"


def test_a_system_turn_takes_the_place_of_the_header_and_stands_first(made):
    renderer, processor, _ = made["jp_alpaca"]
    asked = conversation([("q", "a")], [])
    led = Sample((Message("system", (Text("be brief"),)), *asked.messages))
    text = renderer._tokenizer.decode(renderer.encode(led).input_ids.tolist(), skip_special_tokens=False)
    assert text.startswith("<s>be brief\n\n### 指示:")
    assert processor.apply_chat_template(as_hf(led), tokenize=False) == text
    with pytest.raises(RecordError, match="a system turn is not the first"):
        renderer.encode(Sample((*asked.messages, led.messages[0])))


def test_seed_8_padding_is_never_trained(made):
    from plait.train.energon import PictureCollator

    renderer, _, _ = made["llava"]
    samples = [renderer.encode(conversation([("q", "a" * n)], [])) for n in (1, 9)]
    batch = PictureCollator(64, fixed=True)(samples, renderer.pad_id)
    targets = batch.labels[batch.loss_mask.bool()]
    assert renderer.pad_id not in targets.tolist()
    assert int(batch.loss_mask.sum()) == sum(int(sample.trained.sum()) for sample in samples)
    assert (batch.input_ids == renderer.pad_id).any()


def test_clipping_is_counted_and_keeps_rows_in_place(made):
    renderer, _, _ = made["llava"]
    encoded = renderer.encode(conversation([("q", "an answer")], [picture(0), picture(1)]))
    kept = encoded.clip(30)
    assert len(kept.input_ids) == 30
    assert kept.clipped == len(encoded.input_ids) - 30
    assert encoded.clip(1000) is encoded


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (conversation([("the token <image> itself", "a")], []), "picture_in_text"),
        (Sample((Message("user", (Text("only a question"),)),)), "no_answer"),
    ],
)
def test_what_cannot_be_written_is_rejected(made, sample, reason):
    with pytest.raises(RecordError) as error:
        made["llava"][0].encode(sample)
    assert error.value.reason == reason


def test_a_tokenizer_without_a_picture_token_is_refused(tmp_path):
    folder = tokenizer_folder(tmp_path / "t")
    with pytest.raises(DataError, match="has no <image>"):
        LlavaRenderer(folder, {**FORM, "template": "llava"})


# Instructions


@pytest.mark.parametrize(
    ("question", "answer", "category"),
    [
        ("", "赤いりんご", "caption"),
        ("", "赤いりんご。", "caption"),
        ("", "赤いりんごです。机の上にあります。", "detailed_caption"),
        ("何色?", "赤", "vqa"),
        ("何色?", "赤です。", "detailed_vqa"),
    ],
)
def test_categories_follow_the_second_stage(question, answer, category):
    assert instructions.category(question, answer) == category


def test_every_category_has_its_sentences():
    counts = {name: len(set(sentences)) for name, sentences in instructions.INSTRUCTIONS["ja"].items()}
    assert counts == {"caption": 12, "detailed_caption": 14, "vqa": 14, "detailed_vqa": 9}
    assert {*instructions.INSTRUCTIONS["en"]} == {*counts}


def test_an_instruction_is_drawn_by_the_key_alone():
    drawn = {key: instructions.drawn(key, "", "猫", "ja") for key in map(str, range(400))}
    assert drawn == {key: instructions.drawn(key, "", "猫", "ja") for key in reversed(list(drawn))}
    assert set(drawn.values()) == set(instructions.INSTRUCTIONS["ja"]["caption"])


def test_stage_1_reduces_users_turns_and_stage_2_instructs(made):
    sample = conversation([("何色?", "赤")], [picture(0)])
    reduced = instructions.reduced(sample)
    assert reduced.messages[0].parts == (picture(0), Text("\n"))
    assert reduced.messages[1] == sample.messages[1]
    told = instructions.instructed(sample, "k", "ja").messages[0].parts
    assert told == (picture(0), Text("\n"), Text(instructions.drawn("k", "何色?", "赤", "ja") + "何色?"))


def test_the_tokenizer_of_the_folder_pads_with_its_own_token(made):
    config = json.loads(Path(made["llava"][2], "tokenizer_config.json").read_text())
    assert config["pad_token"] == "<pad>"
