"""Folders of every recipe answer as transformers does; what cannot be asked is a sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import tokenizer_folder
from makers import Maker, made
from PIL import Image
from safetensors.torch import load_file, save_file

from plait import files, layout
from plait.cli.main import main
from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import ConfigError, DataError
from plait.models.build import build
from plait.report import answers
from plait.tokens.render import Renderer
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


# Folders that are not whole


def without(name):
    """Drops a tensor, or a file."""

    def change(folder):
        if (folder / name).is_file():
            (folder / name).unlink()
            return
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"] = torch.zeros(9, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def one_more(folder):
    weights = {**load_file(folder / "model.safetensors"), "more.weight": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FIRST = "multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("llava", without(FIRST), f"lacks {FIRST}; its config promises"),
        (
            "llava",
            another_shape,
            "language_model.lm_head.weight has shape (9, 32), its config says (261, 32)",
        ),
        ("llava", one_more, "has unknown more.weight"),
        ("llava", without("model.safetensors"), "has neither model.safetensors nor"),
        ("llava", cut, "is no whole safetensors file"),
        ("llava", without("tokenizer.json"), "has neither tokenizer.json nor tokenizer.model"),
        ("llava", without("processor_config.json"), "has no processor_config.json"),
        ("llava", without("preprocessor_config.json"), "has no preprocessor_config.json"),
        ("llava", with_text("preprocessor_config.json", "[]"), "preprocessor_config.json holds a JSON list"),
        ("llava", with_text("config.json", "[]"), "config.json holds a JSON list"),
        (
            "llava",
            with_text("chat_template.jinja", "{% if %}"),
            "cannot write a prompt: Expected an expression",
        ),
        (
            "llava",
            with_text("chat_template.jinja", "{{ raise_exception('no') }}"),
            "cannot write a prompt: no",
        ),
        ("llava", with_text("chat_template.jinja", "x"), "writes no picture"),
        ("llava", with_text("generation_config.json", "[]"), "generation_config.json holds a JSON list"),
        ("hf", without("tokenizer.json"), "has neither tokenizer.json nor tokenizer.model"),
        ("hf", with_text("tokenizer.json", "{}"), "tokenizer.json has no model with a vocabulary"),
        ("hf", without("lm_head.weight"), "lacks lm_head.weight"),
        ("solo", without("processor_config.json"), "has no processor_config.json"),
        ("solo", without("model.embed_vision_patch.weight"), "lacks model.embed_vision_patch.weight"),
    ],
)
def test_a_folder_that_is_not_whole_is_a_sentence(
    maker, llava, picture, tmp_path, capsys, kind, change, sentence
):
    source = llava if kind == "llava" else getattr(maker, kind)("answers")
    folder = shutil.copytree(source, tmp_path / "folder")
    change(folder)
    shown = [] if kind == "hf" else ["--image", picture]

    assert main(["generate", str(folder), "--prompt", "hi", "--max-new-tokens", "1", *shown]) == 2

    said = capsys.readouterr()
    assert sentence in said.err
    assert str(folder) in said.err
    assert said.out == ""


def test_what_transformers_has_drawn_is_found_after_loading_too(llava):
    none = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    answers._refuse_incomplete(
        {**none, "unexpected_keys": {"model.layers.0.self_attn.rotary_emb.inv_freq"}}, llava
    )
    with pytest.raises(answers.CheckpointError, match=r"has missing keys: lm_head.weight"):
        answers._refuse_incomplete({**none, "missing_keys": {"lm_head.weight"}}, llava)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize(
    ("kind", "mark"),
    [("llava", "<image>"), ("solo", "<image>"), ("solo", "<vpatch>"), ("solo", "<vision></vision>")],
)
def test_a_prompt_that_writes_a_picture_is_a_sentence(maker, llava, picture, kind, mark, shown):
    model = answers.Model(llava if kind == "llava" else maker.solo("answers"))

    with pytest.raises(ConfigError, match=r"the prompt writes <\w+>, which stands for a picture"):
        model.ask(f"what {mark} is", picture if shown else None)


def test_such_words_are_plain_text_where_they_stand_for_nothing(maker, llava):
    assert answers.Model(maker.hf("answers")).ask("<image>", max_new_tokens=1).tokens
    assert answers.Model(llava).ask("<vpatch>", max_new_tokens=1).tokens


# SOLO, by the template that it was trained with


def exported(source, folder, template):
    """A folder as an export of a run with this template leaves it."""
    shutil.copytree(source, folder)
    if chat_template(template) is not None:
        (folder / "chat_template.jinja").write_text(chat_template(template), encoding="utf-8")
    files.write_manifest(folder, kind="export", settings={"stage": "export", "template": template})
    return folder


@pytest.fixture(scope="module")
def talking(maker):
    """SOLO over a tokenizer with vision and chat tokens, and chatml as the tokenizer's own template."""
    tokenizer = tokenizer_folder(maker.root / "talking", vision=True, chatml=True)
    (tokenizer / "chat_template.jinja").write_text(chat_template("chatml"), encoding="utf-8")
    facts = files.read_manifest(tokenizer)["facts"]
    files.write_manifest(tokenizer, kind="tokenizer", settings={}, facts=facts)
    source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}
    return made(maker.root / "solo-talking", "hf_model", lambda f: build(f, source, [maker.hf(), tokenizer]))


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("template", ["chatml", "pretrain"])
def test_solo_is_asked_by_the_template_of_its_training(maker, talking, picture, tmp_path, template, shown):
    model = answers.Model(exported(talking, tmp_path / "x", template))
    asked = model._inputs("hi there", model._opened(picture) if shown else None)["input_ids"][0].tolist()

    parts = (Picture(Path(picture).read_bytes()), Text("hi there")) if shown else (Text("hi there"),)
    sample = Sample((Message("user", parts), Message("assistant", (Text("yes"),))))
    form = {"template": template, "patch_size": 4, "max_resolution": 1024}
    renderer = Renderer(maker.root / "talking", form)
    trained = renderer.documents([renderer.pieces(sample)])[0]
    assert trained.text.tolist()[: len(asked)] == asked
    assert (model.tokenizer.convert_tokens_to_ids("<|im_start|>") in asked) == (template == "chatml")
    assert (model.tokenizer.convert_tokens_to_ids("<vpatch>") in asked) == shown


def test_a_template_that_writes_no_picture_is_a_sentence(talking, picture, tmp_path):
    folder = exported(talking, tmp_path / "x", "chatml")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    model = answers.Model(folder)

    with pytest.raises(ConfigError, match="writes no picture"):
        model.ask("hi", picture)
    assert model.ask("hi", max_new_tokens=1).tokens
