"""Folders of every recipe answer as transformers does; what cannot be asked is a sentence."""

import json

import pytest
import torch
from makers import Maker
from PIL import Image

from plait import layout
from plait.cli.main import main
from plait.errors import ConfigError, DataError
from plait.report import answers
from plait.tokens.templates import chat_template


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def llava(maker):
    folder = maker.llava("answers")
    (folder / "chat_template.jinja").write_text(chat_template("llava"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.radial_gradient("L").resize((20, 14)).save(path)
    return str(path)


def greedy(model, inputs, forbidden, steps):
    """One token after the other by plain forward passes: ids and their probabilities."""
    ids, chances = inputs["input_ids"], []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids}).logits[0, -1].float()
        logits[list(forbidden)] = float("-inf")
        best = int(logits.argmax())
        chances.append(float(logits.softmax(-1)[best]))
        ids = torch.cat((ids, torch.tensor([[best]])), dim=1)
    return ids[0, inputs["input_ids"].shape[1] :].tolist(), chances


def test_llava_answers_about_a_picture_token_by_token(llava, picture):
    model = answers.Model(llava)
    found = model.ask("what?", picture, max_new_tokens=5)
    text = model.reader.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]}],
        tokenize=False,
    )
    assert text == "<s>[INST] <image>\nwhat?[/INST]"
    shown = Image.open(picture).convert("RGB")
    inputs = dict(model.reader(text=text, images=shown, add_special_tokens=False, return_tensors="pt"))
    inputs.pop("attention_mask")
    ids, chances = greedy(model.model, inputs, [model.spec.image_token_id], len(found.tokens))
    assert [token.id for token in found.tokens] == ids
    assert [token.probability for token in found.tokens] == pytest.approx(chances, abs=1e-4)


def test_a_chat_model_answers_by_its_template(maker):
    folder = maker.hf("answers")
    model = answers.Model(folder)
    found = model.ask("hi", max_new_tokens=4)
    inputs = {"input_ids": torch.tensor([[1, *model.tokenizer("hi", add_special_tokens=False).input_ids]])}
    ids, chances = greedy(model.model, inputs, [], len(found.tokens))
    assert [token.id for token in found.tokens] == ids
    assert [token.probability for token in found.tokens] == pytest.approx(chances, abs=1e-4)


def test_solo_never_writes_a_token_of_a_picture(maker, picture):
    model = answers.Model(maker.solo())
    never = set(model.model.generation_config.suppress_tokens)
    assert never
    for image in (None, picture):
        found = model.ask("hi", image, max_new_tokens=6)
        assert not never & {token.id for token in found.tokens}


@pytest.mark.parametrize(
    ("prompt", "image", "error", "sentence"),
    [
        ("", None, ConfigError, "nothing to ask"),
        ("x", "/no/such.png", DataError, "cannot be read: No such file"),
        ("x", __file__, DataError, "is none of"),
    ],
)
def test_what_cannot_be_asked(llava, prompt, image, error, sentence):
    with pytest.raises(error, match=sentence):
        answers.Model(llava).ask(prompt, image)


def test_a_model_of_text_sees_no_picture(maker, picture):
    with pytest.raises(ConfigError, match="sees no picture"):
        answers.Model(maker.hf("answers")).ask("x", picture)


def test_by_hand_it_prints(llava, capsys):
    assert main(["generate", str(llava), "--prompt", "hi", "--max-new-tokens", "3", "--probabilities"]) == 0
    assert capsys.readouterr().out.count("%") == 3
    assert main(["generate", str(llava / "no")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_as_a_stage_it_writes_a_line_a_prompt(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export, target = layout.Export(run="r", step=5), layout.Generated(run="r", step=5)
    (tmp_path / str(export)).parent.mkdir(parents=True)
    (tmp_path / str(export)).symlink_to(llava)
    prompts = [{"prompt": "hi", "image": None, "max_new_tokens": 2}] * 2
    chosen = json.dumps({"generate": prompts})
    assert main(["generate", str(export), str(target), "--settings", chosen]) == 0
    lines = [json.loads(line) for line in (tmp_path / str(target)).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["hi", "hi"]
    assert len(lines[0]["tokens"]) == 2
    assert main(["generate", str(llava), str(target), "--settings", chosen]) == 2


def test_a_turned_picture_is_seen_as_each_recipe_trained_it(maker, llava, tmp_path):
    """LLaVA was trained on it upright, SOLO as it is stored."""
    tags = Image.Exif()
    tags[0x0112] = 6
    upright = Image.radial_gradient("L").resize((14, 20))
    upright.putpixel((0, 0), 255)
    turned = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=tags)
    plain = tmp_path / "plain.png"
    upright.save(plain)

    sees, stored = answers.Model(llava), answers.Model(maker.solo())

    assert sees._opened(str(turned)).tobytes() == sees._opened(str(plain)).tobytes()
    assert stored._opened(str(turned)).size == (20, 14)
