"""What the trainer sees is what the exported processor gives: ids and pixels; only answers are trained."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from folders import tokenizer_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizer_folders import make
from transformers import AutoImageProcessor, AutoProcessor

from plait import files
from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import ConfigError, DataError, RecordError
from plait.models.build import build
from plait.models.specs import Spec
from plait.tokens import instructions
from plait.tokens.llava import LlavaRenderer, pixels
from plait.tokens.pictures import name_of
from plait.tokens.templates import HEADER, chat_template

RECIPES = {"llava": "clip", "jp_alpaca": "siglip"}
PAD = 260
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


OTHER = "<it's \\ a picture>"


@pytest.fixture(scope="module", params=[(262, 2), (259, 0), (261, 260)], ids=str)
def other(made, request, tmp_path_factory):
    """A model whose ids of a picture and of padding are EOS, <unk> or tokens that stood there unused."""
    from transformers import PreTrainedTokenizerFast

    image, pad = request.param
    root = tmp_path_factory.mktemp("other")
    tokenizer = tokenizer_folder(root / "tokenizer", more=3)
    named = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    named.add_special_tokens({"additional_special_tokens": [OTHER]}, replace_extra_special_tokens=False)
    named.save_pretrained(tokenizer)
    facts = files.read_manifest(tokenizer)["facts"] | {"vocab_size": len(named)}
    files.write_manifest(tokenizer, kind="tokenizer", settings={}, facts=facts)
    base, model = root / "base", root / "model"
    source = {"kind": "llava", "base": "b", "vision": "v", "tokenizer": "t"}
    source |= {"image_token_id": image, "pad_token_id": pad}
    tower = made["llava"][2].parent / "tower-clip"
    for folder, one, parts in (
        (base, {"kind": "init", "tokenizer": "t", "num_hidden_layers": 1}, [tokenizer]),
        (model, source, [base, tower, tokenizer]),
    ):
        folder.mkdir()
        build(folder, one, parts)
    return tokenizer, model, image, pad


@pytest.mark.parametrize("template", RECIPES)
def test_seed_17_the_trainer_sees_the_ids_of_the_processor_with_tokens_of_other_names(other, template):
    """Padding on the other side: what is compared is each sequence, and where its padding stands."""
    from plait.train.energon import PictureCollator

    tokenizer, model, image, pad = other
    markup = chat_template(template, name_of(model, image))
    processor = AutoProcessor.from_pretrained(model)
    samples = [
        conversation([("what?", "this"), ("<image> <pad> you said?", "yes")], [picture(1), picture(2)]),
        conversation([("and?", "a longer answer")], [picture(3)]),
    ]
    texts = [
        processor.apply_chat_template(as_hf(one), chat_template=markup, tokenize=False) for one in samples
    ]
    served = processor(
        text=texts, images=[opened(one) for one in samples], add_special_tokens=False, padding=True,
        return_tensors="np",
    )  # fmt: skip
    spec = Spec.of(model)
    assert (spec.image_token_id, spec.pad_token_id) == (image, pad)
    renderer = LlavaRenderer(tokenizer, {**FORM, "template": template}, spec.image_token_id)
    encoded = [renderer.encode(one) for one in samples]
    batch = PictureCollator(256, fixed=False, pad_id=pad)(encoded)
    for number, one in enumerate(encoded):
        attended = served["attention_mask"][number].astype(bool)
        assert one.input_ids.tolist() == served["input_ids"][number][attended].tolist()
        assert set(served["input_ids"][number][~attended]) <= {pad}
        assert set(batch.input_ids[number, len(one.input_ids) :].tolist()) <= {pad}
        assert (one.picture_rows >= 0).tolist() == (one.input_ids == image).tolist()
        trained = batch.labels[number][batch.loss_mask[number].bool()].tolist()
        assert trained == one.input_ids[one.trained].tolist()
        assert trained.count(2) == len(samples[number].messages) // 2  # every answer ends, whatever pads
    assert processor.tokenizer.pad_token_id == pad


def test_a_text_that_writes_the_models_token_is_rejected_and_no_other(other):
    tokenizer, model, image, _ = other
    renderer = LlavaRenderer(tokenizer, {**FORM, "template": "llava"}, image)
    renderer.encode(conversation([("the token <image> itself", "a")], []))
    with pytest.raises(RecordError, match="which stands for a picture"):
        renderer.encode(conversation([(f"the token {name_of(model, image)} itself", "a")], []))


LOOKALIKES = ["</s>", "[INST]", "### 応答:\n", "<", "\n", " ", "▁", "<pad>", "日本", "😀"]
ANY = st.lists(st.sampled_from(LOOKALIKES) | TEXT, min_size=1, max_size=4).map("".join)
SEEN = st.lists(st.none() | ANY, min_size=1, max_size=4)
"""The parts of a user's turn: None is a picture."""


@pytest.fixture(scope="module")
def mistral(tokenizers, tmp_path_factory):
    """Mistral's own pieces with the tokens of pictures and padding."""
    folder = tmp_path_factory.mktemp("mistral") / "llava"
    return make(folder, {"kind": "extend", "base": "base", "add": ["image"]}, tokenizers["base"])


@pytest.fixture(scope="module")
def sentencepiece(made, mistral):
    """By template: a renderer and transformers' processor over Mistral's tokenizer."""
    from transformers import AutoTokenizer, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(mistral)
    return {
        template: (
            LlavaRenderer(mistral, {**FORM, "template": template}),
            LlavaProcessor(
                AutoImageProcessor.from_pretrained(made[template][2]),
                tokenizer,
                patch_size=8,
                vision_feature_select_strategy="default" if kind == "clip" else "full",
                num_additional_image_tokens=int(kind == "clip"),
                chat_template=chat_template(template),
            ),
        )
        for template, kind in RECIPES.items()
    }


def interleaved(turns):
    """Users' turns of texts and pictures anywhere, an answer to each."""
    messages = []
    for parts, answer in turns:
        seen = (picture(n) if part is None else Text(part) for n, part in enumerate(parts))
        messages += [Message("user", tuple(seen)), Message("assistant", (Text(answer),))]
    return Sample(tuple(messages))


@pytest.mark.parametrize("template", RECIPES)
@settings(max_examples=25)
@given(turns=st.lists(st.tuples(SEEN, ANY), min_size=1, max_size=3))
def test_seed_17_ids_are_equal_wherever_pictures_stand_and_whatever_is_said(sentencepiece, template, turns):
    renderer, processor = sentencepiece[template]
    sample = interleaved(turns)
    text = processor.apply_chat_template(as_hf(sample), tokenize=False)
    # as a user calls it: no keyword keeps the tokenizer from adding tokens of its own
    expected = processor(text=text, images=opened(sample) or None)["input_ids"]
    encoded = renderer.encode(sample)
    assert encoded.input_ids.tolist() == (expected if isinstance(expected[0], int) else expected[0])
    # what a model answers to is what stood before the answer in training
    asked = processor.apply_chat_template(as_hf(sample)[:1], tokenize=False, add_generation_prompt=True)
    images = opened(Sample(sample.messages[:1])) or None
    prompt = np.ravel(processor(text=asked, images=images)["input_ids"])
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert not encoded.trained[: len(prompt)].any()
    assert encoded.trained[len(prompt)]


@pytest.mark.parametrize("template", RECIPES)
def test_answers_of_mistrals_pieces_are_trained_and_nothing_else(sentencepiece, template):
    renderer, processor = sentencepiece[template]
    encoded = renderer.encode(interleaved([(["a", None, "b"], "赤い"), (["</s>", None], "two words")]))
    names = processor.tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.trained].tolist())
    begin = {"llava": ["▁", "赤"], "jp_alpaca": ["赤"]}[template]
    assert names == [*begin, "い", "</s>", "▁two" if template == "llava" else "two", "▁words", "</s>"]


def file_of(kind, **keys):
    """A picture file of 50 x 40 pixels whose mode or tags programs read in several ways."""
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 255, (40, 50, 4), np.uint8), "RGBA")
    image = {
        "16 bits": lambda: Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32),
        "palette": lambda: noise.convert("RGB").quantize(16),
        "transparent": lambda: noise,
        "CMYK": lambda: noise.convert("RGB").convert("CMYK"),
        "turned": lambda: noise.convert("RGB"),
        "grey": lambda: noise.convert("L"),
    }[kind]()
    file = io.BytesIO()
    if kind == "turned":
        tags = Image.Exif()
        tags[0x0112] = 6
        keys = {"exif": tags}
    image.save(file, "JPEG" if kind in {"CMYK", "turned"} else "PNG", **keys)
    return file.getvalue()


@pytest.mark.parametrize("template", RECIPES)
@pytest.mark.parametrize("kind", ["16 bits", "palette", "transparent", "CMYK", "turned", "grey"])
def test_seed_17_pixels_are_those_of_a_chat_about_the_file(made, template, kind, tmp_path):
    _, processor, model = made[template]
    (tmp_path / "file").write_bytes(file_of(kind))
    content = [{"type": "image", "path": str(tmp_path / "file")}, {"type": "text", "text": "?"}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="np"
    )
    ours = pixels([file_of(kind)], AutoImageProcessor.from_pretrained(model))
    assert np.array_equal(ours, expected["pixel_values"])
    assert ours.dtype == np.float32


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
    batch = PictureCollator(64, fixed=True, pad_id=PAD)(samples)
    targets = batch.labels[batch.loss_mask.bool()]
    assert PAD not in targets.tolist()
    assert int(batch.loss_mask.sum()) == sum(int(sample.trained.sum()) for sample in samples)
    assert (batch.input_ids == PAD).any()


def test_clipping_is_counted_and_keeps_rows_in_place(made):
    renderer, _, _ = made["llava"]
    encoded = renderer.encode(conversation([("q", "an answer")], [picture(0), picture(1)]))
    kept = encoded.clip(30)
    assert len(kept.input_ids) == 30
    assert kept.clipped == len(encoded.input_ids) - 30
    assert kept.picture_rows.tolist() == encoded.picture_rows[:30].tolist()
    assert encoded.trained[1:].any()
    assert not kept.trained[1:].any()
    assert encoded.clip(1000) is encoded


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (conversation([("the token <image> itself", "a")], []), "picture_in_text"),
        (Sample((Message("user", (Text("only a question"),)),)), "no_answer"),
        (
            Sample((Message("user", (Text("<image>"),)), Message("assistant", (picture(0), Text("a"))))),
            "picture_not_users",
        ),
    ],
)
def test_what_cannot_be_written_is_rejected(made, sample, reason):
    with pytest.raises(RecordError) as error:
        made["llava"][0].encode(sample)
    assert error.value.reason == reason


def test_a_tokenizer_without_a_picture_token_is_refused(tmp_path):
    folder = tokenizer_folder(tmp_path / "t")
    with pytest.raises(ConfigError, match="has no token <image>"):
        LlavaRenderer(folder, {**FORM, "template": "llava"})


@pytest.mark.parametrize(
    ("form", "facts", "sentence"),
    [
        ({"template": "mistral"}, {}, "the template mistral has no <image>"),
        ({"template": "tokenizer"}, {}, "the template tokenizer has no <image>"),
        ({"picture_tokens": None}, {}, "no picture_tokens"),
        ({}, {"eos_id": None}, "no answer would have an end"),
    ],
)
def test_what_a_format_or_tokenizer_lacks_is_named(tmp_path, form, facts, sentence):
    folder = tokenizer_folder(tmp_path / "t", image=True)
    found = files.read_manifest(folder)["facts"]
    files.write_manifest(folder, kind="tokenizer", settings={}, facts={**found, **facts})
    with pytest.raises(DataError, match=sentence):
        LlavaRenderer(folder, {**FORM, "template": "llava", **form})


def test_the_manifest_of_a_tokenizer_tells_the_ids(mistral):
    facts = files.read_manifest(mistral, kind="tokenizer")["facts"]
    assert (facts["image_token_id"], facts["pad_token_id"]) == (32000, 32001)
    assert files.read_json(mistral / "tokenizer_config.json")["pad_token"] == "<pad>"


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


@pytest.mark.parametrize(
    ("question", "answer", "category"),
    [("", "A red ball. It lies.", "detailed_caption"), ("How far?", "3.5 km", "vqa"), ("", "A.", "caption")],
)
def test_points_of_numbers_end_no_sentence_in_english(question, answer, category):
    assert instructions.category(question, answer, "en") == category


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


def test_a_turn_without_a_picture_is_not_reduced(mistral):
    """Nothing would be left of it: [INST] [/INST]."""
    sample = conversation([("何色?", "赤"), ("形は?", "丸")], [picture(0)])
    assert instructions.reduced(sample).messages[2] == sample.messages[2]
    alone = Sample((Message("user", (Text("hi"),)), Message("assistant", (Text("ho"),))))
    assert instructions.reduced(alone) == alone


@pytest.mark.parametrize(("template", "language"), [("llava", "en"), ("jp_alpaca", "ja")])
def test_instructions_are_in_the_language_of_the_template(mistral, template, language):
    form = {**FORM, "template": template, "instruction": "drawn", "language": None}
    sample = conversation([("", "赤")], [picture(0)])
    told = LlavaRenderer(mistral, form).instructed(sample, "k").messages[0]
    assert told.parts[-1].text in instructions.INSTRUCTIONS[language]["caption"]


def test_an_instruction_stands_where_the_pictures_stay_in_place():
    sample = interleaved([(["Is ", None, " like ", None, "?"], "Yes.")])
    told = instructions.instructed(sample, "k", "en").messages[0].parts
    sentence = instructions.drawn("k", "Is  like ?", "Yes.", "en")
    assert told == (Text(f"{sentence} "), *sample.messages[0].parts)
    behind = interleaved([(["What?\n", None], "A ball")])
    told = instructions.instructed(behind, "k", "en").messages[0].parts
    sentence = instructions.drawn("k", "What?", "A ball", "en")
    assert told == (picture(1), Text("\n"), Text(f"{sentence} What?"))


def test_no_instruction_speaks_of_a_picture_that_is_not_there():
    alone = interleaved([(["何色?"], "赤")])
    assert instructions.instructed(alone, "k", "ja") == alone
    spoken = Sample((Message("assistant", (Text("a"),)),))
    assert instructions.instructed(spoken, "k", "ja") == spoken


@pytest.mark.parametrize(
    ("instruction", "text"),
    [("keep", "\n何色?"), ("none", "\n"), ("drawn", "\n{}何色?")],
)
def test_a_format_says_what_becomes_of_users_turns(mistral, instruction, text):
    form = {**FORM, "template": "jp_alpaca", "instruction": instruction}
    sample = conversation([("何色?", "赤")], [picture(0)])
    told = LlavaRenderer(mistral, form).instructed(sample, "k").messages[0]
    assert told.parts[0] == picture(0)
    words = "".join(part.text for part in told.parts[1:])
    assert words == text.format(instructions.drawn("k", "何色?", "赤", "ja"))


def test_the_tokenizer_of_the_folder_pads_with_its_own_token(made):
    config = json.loads(Path(made["llava"][2], "tokenizer_config.json").read_text())
    assert config["pad_token"] == "<pad>"
