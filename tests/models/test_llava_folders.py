"""LLaVA folders as transformers sees them: every part is what it was made from."""

import json
import logging
import shutil
import socket

import numpy as np
import pytest
import torch
from folders import tokenizer_folder
from makers import Maker
from PIL import Image
from safetensors.torch import load_file, save_file

from plait import files
from plait.errors import CheckpointError, ConfigError
from plait.models.specs import Spec
from plait.models.weights import FolderTensors, check_shapes, merkle
from plait.tokens.vocabulary import padded_vocab_size

SOURCE = {"kind": "llava", "base": "b", "vision": "v", "tokenizer": "t"}
IDS = torch.tensor([[1, 70, 80, 90, 100, 35, 36, 200], [1, 3, 3, 3, 250, 9, 10, 11]])
WIDTH = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
FIRST, SECOND = (f"multi_modal_projector.linear_{n}.weight" for n in (1, 2))


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def tower(maker):
    """Makes a tower with norms and biases of its own."""

    def run(architecture, **sizes):
        name = "-".join([architecture, "shaken", *map(str, sizes.values())])
        return maker.tower(name, shake=True, initializer_range=0.2, **sizes)

    return run


@pytest.fixture(scope="module")
def parts(maker, tower):
    return maker.hf(), tower("clip"), maker.image


def loaded(folder, **kwargs):
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **kwargs
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def loaded_tower(folder):
    import transformers

    name = files.read_json(folder / "config.json")["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def processor_of(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# The language model


@pytest.mark.parametrize(
    ("kind", "tied"),
    [("Mistral", False), ("Llama", False), ("Llama", True), ("Qwen2", False), ("Qwen2", True)],
)
def test_logits_on_text_are_the_bases(make, maker, parts, kind, tied):
    from transformers import AutoModelForCausalLM

    base = maker.foreign(kind, tied=tied)
    source = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()

    folder = make(SOURCE, base, *parts[1:])

    model = loaded(folder)
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, source(input_ids=IDS).logits
    assert ours.shape[-1] == 261
    assert theirs.abs().max() > 0.5
    assert torch.allclose(ours[..., :259], theirs, atol=1e-5)
    assert not model.config.tie_word_embeddings
    assert Spec.of(folder).attention_bias == (kind == "Qwen2")


def test_seed_7_the_output_layer_is_copied_and_never_drawn(make, maker, parts):
    for base, head in (
        (maker.hf(), "lm_head.weight"),
        (maker.foreign("Llama", tied=True), "model.embed_tokens.weight"),
    ):
        built = FolderTensors(make(SOURCE, base, *parts[1:]))

        assert torch.equal(built[HEAD][:259], FolderTensors(base)[head])


@pytest.mark.parametrize("policy", ["mean", "normal", "zeros"])
def test_new_rows_follow_their_policy_in_both_tables(make, maker, parts, policy):
    base = FolderTensors(parts[0])
    built = FolderTensors(make({**SOURCE, "new_rows": policy}, *parts))

    for name in (EMBEDDING, HEAD):
        rows, old = built[name][259:], base[name.removeprefix("language_model.")]
        assert rows.shape == (2, 32)
        expected = {"mean": old.mean(0).expand(2, -1), "zeros": torch.zeros(2, 32)}.get(policy)
        assert expected is None or torch.allclose(rows, expected, atol=1e-6)
        assert policy != "normal" or 0.05 < rows.std() < 0.15


def test_new_rows_of_a_tied_base_stay_equal_in_both_tables(make, maker, parts):
    built = FolderTensors(
        make({**SOURCE, "new_rows": "normal"}, maker.foreign("Llama", tied=True), *parts[1:])
    )

    assert torch.equal(built[EMBEDDING], built[HEAD])


def test_seed_9_the_vocabulary_is_never_padded_even_when_it_divides(make, maker, parts, tmp_path):
    for more in (122, 123, 124):
        tokenizer = tokenizer_folder(tmp_path / str(more), image=True, more=more)
        folder = make(SOURCE, *parts[:2], tokenizer)

        assert Spec.of(folder).vocab_size == 261 + more == len(FolderTensors(folder)[HEAD])
        assert len(processor_of(folder).tokenizer) == 261 + more
    assert padded_vocab_size(384, tp=1) == 384 == 261 + 123


def test_a_base_with_more_rows_than_tokens_keeps_them(make, maker, parts):
    """Published Qwen2 models have such rows."""
    base = maker.foreign("Qwen2", vocab_size=300, name="roomy")

    built = make(SOURCE, base, *parts[1:])

    assert torch.equal(FolderTensors(built)[HEAD], FolderTensors(base)["lm_head.weight"])
    assert loaded(built).config.text_config.vocab_size == 300


# The tower


@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_are_the_source_towers_projected(make, maker, tower, kind, layer):
    vision = tower(kind)
    folder = make({**SOURCE, "vision_feature_layer": layer}, maker.hf(), vision, maker.image)
    pixels = torch.randn(2, 3, 30, 30)

    with torch.no_grad():
        hidden = loaded_tower(vision)(pixels, output_hidden_states=True).hidden_states
        ours = loaded(folder).get_image_features(pixels, return_dict=True)
    built, source = FolderTensors(folder), hidden[layer][:, kind == "clip" :]

    def linear(values, name):
        return values @ built[name].T + built[name.replace("weight", "bias")]

    expected = linear(torch.nn.functional.gelu(linear(source, FIRST)), SECOND)
    assert len(hidden) == 4
    assert not torch.allclose(hidden[-1], hidden[-2], atol=1e-2)
    assert torch.allclose(ours.hidden_states[layer], hidden[layer], atol=1e-5)
    assert torch.allclose(torch.stack(list(ours.pooler_output)), expected, atol=1e-5)


SHAPES = {
    "CLIP-L/336": ("clip", {"image_size": 336, "patch_size": 14}, {}, 577, 576),
    "SigLIP so400m/384": ("siglip", {"image_size": 384, "patch_size": 14}, {}, 729, 729),
    "SigLIP, not divisible": ("siglip", {"image_size": 46, "patch_size": 14}, {}, 9, 9),
    "CLIP, not divisible": ("clip", {"image_size": 30, "patch_size": 8}, {}, 10, 9),
    "CLIP with its class token": (
        "clip",
        {"image_size": 30, "patch_size": 8},
        {"drop_class_token": False},
        10,
        10,
    ),
    "SigLIP has none to drop": (
        "siglip",
        {"image_size": 30, "patch_size": 8},
        {"drop_class_token": True},
        9,
        9,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_processor_gives_a_picture_as_many_tokens_as_the_tower_features(make, maker, tower, name):
    kind, sides, keys, positions, tokens = SHAPES[name]
    folder = make({**SOURCE, **keys}, maker.hf(), tower(kind, **WIDTH, **sides), maker.image)
    shown = [picture(30, 50, 1), picture(90, 20, 2)]

    inputs = processor_of(folder)(images=shown, text="a<image>b<image>c", return_tensors="pt")

    model, vision = loaded(folder), Spec.of(folder).vision
    assert (vision.positions, vision.tokens, model.config.image_seq_length) == (positions, tokens, tokens)
    assert (
        FolderTensors(folder).shapes["vision_tower.vision_model.embeddings.position_embedding.weight"][0]
        == positions
    )
    assert inputs["input_ids"].shape == (1, 3 + 2 * tokens)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * tokens
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32770, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
}  # fmt: skip
LLM_JP_13B = {
    "model_type": "llama", "vocab_size": 99586, "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "rope_theta": 10000.0,
}  # fmt: skip
CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
SO400M_384 = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
ABBREVIATED = {"model_type": "mistral", "vocab_size": 32064}
REAL = {
    "llava-mistral-7b": (MISTRAL_7B, CLIP_L_336, "default", 577, 576),
    "llava-jp-13b": (LLM_JP_13B, SO400M_384, "full", 729, 729),
    "an abbreviated config": (ABBREVIATED, {"model_type": "clip_vision_model"}, "full", 50, 50),
    "another abbreviated config": (
        {"model_type": "qwen2"},
        {"model_type": "siglip_vision_model"},
        "full",
        196,
        196,
    ),
    "the shortest config": ({"model_type": "llama"}, {"image_size": 336}, "default", 101, 100),
}


@pytest.mark.parametrize("name", REAL)
def test_shapes_of_published_models_are_those_of_transformers(name):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text, vision, strategy, positions, tokens = REAL[name]
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "vision_feature_select_strategy": strategy,
    }
    with torch.device("meta"):
        theirs = LlavaForConditionalGeneration(LlavaConfig(**config)).state_dict()

    spec = Spec.from_config(config)

    check_shapes({published(name): tuple(tensor.shape) for name, tensor in theirs.items()}, spec.shapes, name)
    assert (spec.vision.positions, spec.vision.tokens) == (positions, tokens)
    assert spec.vision.used_layers == vision.get("num_hidden_layers", 12) - 1


def published(name):
    """A parameter's name in a published folder."""
    starts = {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    old = next(start for start in starts if name.startswith(start))
    return starts[old] + name.removeprefix(old)


def test_a_random_tower_is_what_transformers_makes_of_its_config(maker):
    for kind, mean in (("clip", 0.48145466), ("siglip", 0.5)):
        folder = maker.tower(kind)
        model = loaded_tower(folder)
        shown = files.read_json(folder / "preprocessor_config.json")

        assert Spec.of(maker.llava(kind, tower=folder)).vision.kind == kind
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == FolderTensors(
            folder
        ).shapes
        assert shown["image_mean"][0] == mean
        again = maker.tower(f"{kind}-again")
        assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def saved(folder, kind, *, tower, beside=None):
    """A tower's weights in a folder of another kind, with its preprocessor."""
    import transformers

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = files.read_json(tower / "config.json")
    if kind in ("CLIP", "Siglip"):
        text = {**small, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
        whole = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=config)
    else:
        whole = transformers.CLIPVisionConfig(**config)
    model = getattr(transformers, f"{kind}Model" if kind in ("CLIP", "Siglip") else kind)(whole)
    model.vision_model.load_state_dict(load_file(tower / "model.safetensors"))
    model.save_pretrained(folder)
    shutil.copyfile(tower / "preprocessor_config.json", folder / "preprocessor_config.json")
    files.write_manifest(folder, kind="hf_model", settings={}, facts={})
    return folder


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "CLIPVisionModelWithProjection"])
def test_the_tower_of_a_whole_model_is_taken_and_what_is_not_is_counted(
    make, maker, tower, kind, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "plait")
    alone = tower("siglip" if kind == "Siglip" else "clip")
    whole = saved(tmp_path, kind, tower=alone)

    built, expected = (make(SOURCE, maker.hf(), vision, maker.image) for vision in (whole, alone))

    assert merkle(FolderTensors(built)) == merkle(FolderTensors(expected))
    others = len(FolderTensors(whole)) - len(FolderTensors(alone))
    first, second = (record.getMessage() for record in caplog.records if record.name.startswith("plait"))
    assert f", {others} tensors beside the tower left out" in first
    assert "left out" not in second


def as_transformers_4(tower, folder):
    """A tower as transformers 4 has written it, position numbers and all."""
    shutil.copytree(tower, folder)
    old = {f"vision_model.{name}": tensor for name, tensor in load_file(tower / "model.safetensors").items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_tower_of_transformers_4_is_the_same_tower(make, maker, tower, tmp_path, caplog):
    caplog.set_level(logging.INFO, "plait")
    alone = tower("clip")

    built = make(SOURCE, maker.hf(), as_transformers_4(alone, tmp_path / "old"), maker.image)

    assert "1 counts of positions (position_ids) left out" in caplog.records[-1].getMessage()
    assert merkle(FolderTensors(built)) == merkle(FolderTensors(make(SOURCE, maker.hf(), alone, maker.image)))


def test_the_config_that_openais_folders_repeat_is_heeded(make, maker, tower, tmp_path):
    whole = saved(tmp_path, "CLIP", tower=tower("clip"))
    config = files.read_json(whole / "config.json")
    vision = config["vision_config"]
    twice = {"vision_config": {**vision, "image_size": 224}, "vision_config_dict": {"image_size": 30}}
    (whole / "config.json").write_text(json.dumps({**config, **twice}))

    assert Spec.of(make(SOURCE, maker.hf(), whole, maker.image)).vision.image_size == 30


# The projector


def test_without_biases(make, parts):
    folder = make({**SOURCE, "projector_bias": False}, *parts)

    names = [name for name in FolderTensors(folder) if "projector" in name]
    assert names == [FIRST, SECOND]
    assert loaded(folder).model.multi_modal_projector.linear_1.bias is None


@pytest.mark.parametrize("bias", [True, False])
def test_an_inner_size_of_its_own_comes_with_the_class_that_knows_it(make, parts, bias):
    folder = make({**SOURCE, "projector_hidden_size": 56, "projector_bias": bias}, *parts)
    model = loaded(folder, trust_remote_code=True)
    pixels = torch.randn(1, 3, 30, 30)

    with torch.no_grad():
        ours = model.get_image_features(pixels, return_dict=True)
        hidden = loaded_tower(parts[1])(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    built = FolderTensors(folder)
    expected = torch.nn.functional.gelu(hidden @ built[FIRST].T) @ built[SECOND].T  # drawn biases are zeros
    assert built[FIRST].shape == (56, 16)
    assert torch.allclose(ours.pooler_output[0], expected[0], atol=1e-5)
    assert Spec.of(folder).projector.hidden_size == 56


def test_the_language_models_own_size_needs_no_code(make, parts):
    folder = make({**SOURCE, "projector_hidden_size": 32}, *parts)

    assert not [*folder.glob("*.py")]
    assert "auto_map" not in files.read_json(folder / "config.json")


def test_a_projector_from_a_file(make, parts, tmp_path):
    given = {f"model.mm.linear_{n}.weight": torch.randn(32, size) for n, size in ((1, 16), (2, 32))}
    save_file({**given, "other.weight": torch.zeros(1)}, tmp_path / "p.safetensors")
    source = {**SOURCE, "projector": str(tmp_path / "p.safetensors")}

    built = FolderTensors(make({**source, "projector_bias": False}, *parts))

    assert torch.equal(built[FIRST], given["model.mm.linear_1.weight"])
    with pytest.raises(CheckpointError, match=r"p.safetensors lacks linear_1.bias, linear_2.bias"):
        make(source, *parts)
    with pytest.raises(CheckpointError, match="which is no file"):
        make({**source, "projector": str(tmp_path / "q.safetensors")}, *parts)
    (tmp_path / "r.safetensors").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        make({**source, "projector": str(tmp_path / "r.safetensors")}, *parts)


def test_a_file_with_two_such_tensors_is_refused(make, parts, tmp_path):
    two = {f"{part}.linear_1.weight": torch.zeros(1) for part in "ab"}
    save_file(two, tmp_path / "p.safetensors")

    with pytest.raises(CheckpointError, match=r"has a.linear_1.weight and b.linear_1.weight"):
        make({**SOURCE, "projector": str(tmp_path / "p.safetensors")}, *parts)


def test_a_drawn_projector_has_the_type_of_the_language_model(make, maker, parts, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(maker.hf(), base)
    half = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    config = files.read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))

    folder = make(SOURCE, base, *parts[1:])

    assert FolderTensors(folder)[FIRST].dtype == torch.bfloat16 == loaded(folder).dtype


# Tokens and generation


def test_ids_are_those_of_the_tokens(make, parts):
    folder = make(SOURCE, *parts)
    config, processor = files.read_json(folder / "config.json"), processor_of(folder)

    assert (config["image_token_index"], config["pad_token_id"]) == (259, 260)
    assert (processor.image_token, processor.image_token_id) == ("<image>", 259)
    assert (processor.tokenizer.pad_token_id, processor.tokenizer.padding_side) == (260, "left")


def test_ids_can_be_named(make, maker, parts, tmp_path):
    tokenizer = tokenizer_folder(tmp_path / "t", more=3)
    source = {**SOURCE, "image_token_id": 261, "pad_token_id": 259}

    folder = make(source, *parts[:2], tokenizer)

    processor = processor_of(folder)
    inputs = processor(images=picture(9, 9), text="x<extra_2>", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [*processor.tokenizer("x")["input_ids"], *[261] * 9]
    assert processor.tokenizer.pad_token_id == 259
    assert loaded(folder).generation_config.suppress_tokens == [261]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, r"has no token <image>"),
        ({"image_token_id": 259}, r"has no token <pad>"),
        ({"image_token_id": 259, "pad_token_id": 999}, r"has no token 999"),
        ({"image_token_id": 259, "pad_token_id": 259}, r"the picture and padding are one token, 259"),
        ({"image_token_id": 1, "pad_token_id": 259}, r"writes its token 1, '<s>', for BOS"),
        ({"image_token_id": 2, "pad_token_id": 259}, r"writes its token 2, '</s>', for EOS"),
        ({"image_token_id": 0, "pad_token_id": 259}, r"token 0, '<unk>', for what it does not know"),
        ({"image_token_id": 70, "pad_token_id": 259}, r"as its token 70 wherever it is written"),
        ({"image_token_id": 259, "pad_token_id": 70}, r"as its token 70 wherever it is written"),
    ],
)
def test_a_tokenizer_without_such_tokens_is_refused(make, maker, parts, tmp_path, keys, sentence):
    tokenizer = tokenizer_folder(tmp_path / "t", more=1)

    with pytest.raises(ConfigError, match=sentence):
        make({**SOURCE, **keys}, *parts[:2], tokenizer)


def test_a_tokenizers_own_name_for_pictures_does_not_go_before_the_models(make, maker, parts, tmp_path):
    """As the tokenizers of released LLaVAs have it, the processor would take that one."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizer_folder(tmp_path / "t", image=True, more=1)
    named = PreTrainedTokenizerFast.from_pretrained(
        tokenizer, extra_special_tokens={"image_token": "<image>"}
    )
    named.save_pretrained(tokenizer)
    assert PreTrainedTokenizerFast.from_pretrained(tokenizer).image_token == "<image>"

    processor = processor_of(make({**SOURCE, "image_token_id": 261}, *parts[:2], tokenizer))

    assert (processor.image_token, processor.image_token_id) == ("<extra_0>", 261)


def test_pictures_are_never_generated_and_a_batch_answers_as_each_alone(make, parts):
    folder = make(SOURCE, *parts)
    model, processor = loaded(folder), processor_of(folder)
    with torch.no_grad():
        model.lm_head.weight[259] = 100 * model.lm_head.weight[259].sign()
    texts, shown = ["<image>", "a long text <image> and"], [picture(9, 9, 1), picture(20, 9, 2)]

    def answer(texts, shown):
        inputs = processor(images=shown, text=texts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :]

    together = answer(texts, shown)

    assert not (together == 259).any()
    for row, one in enumerate(zip(texts, shown, strict=True)):
        assert torch.equal(answer([one[0]], [one[1]])[0], together[row])


# Refusals


def test_seed_16_nothing_is_asked_of_the_network(make, parts, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)

    folder = make({**SOURCE, "projector_hidden_size": 40}, *parts)

    assert "_name_or_path" not in (folder / "config.json").read_text()


def test_the_name_of_the_base_on_the_hub_is_forgotten(make, maker, parts, tmp_path):
    base = shutil.copytree(maker.hf(), tmp_path / "base")
    config = {**files.read_json(base / "config.json"), "_name_or_path": "mistralai/Mistral-7B-v0.1"}
    (base / "config.json").write_text(json.dumps(config))

    assert "mistralai" not in (make(SOURCE, base, *parts[1:]) / "config.json").read_text()


def test_other_bases_and_towers_are_refused(make, maker, parts):
    with pytest.raises(CheckpointError, match=r"is a SoloForCausalLM"):
        make(SOURCE, maker.solo(), parts[1], tokenizer_folder(maker.root / "both", vision=True, image=True))
    with pytest.raises(CheckpointError, match=r"has a vision tower of type 'mistral'"):
        make(SOURCE, parts[0], parts[0], parts[2])
    llava = maker.llava()
    for source in ({"kind": "extend", "base": "b", "tokenizer": "t"}, SOURCE):
        rest = (maker.image,) if source["kind"] == "extend" else parts[1:]
        with pytest.raises(CheckpointError, match="is a LlavaForConditionalGeneration"):
            make(source, llava, *rest)
    with pytest.raises(CheckpointError, match="is a Qwen2ForCausalLM"):
        make({"kind": "solo", "base": "b", "tokenizer": "t"}, maker.foreign("Qwen2"), maker.vision)


def test_another_models_tokenizer_is_refused(make, maker, parts):
    base = shutil.copytree(maker.hf(), maker.root / "other")
    text = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(text.replace('"!": 3,', '"!": 4,').replace('"\\"": 4,', '"\\"": 3,'))

    with pytest.raises(CheckpointError, match=r"^'\"' is token 3 of .*other and 4 of .*image"):
        make(SOURCE, base, *parts[1:])


def test_a_tower_that_does_not_say_how_pictures_are_prepared_is_refused(make, maker, parts, tmp_path):
    tower = shutil.copytree(parts[1], tmp_path / "tower")
    path = tower / "preprocessor_config.json"
    shown = files.read_json(path)

    path.write_text(json.dumps({**shown, "crop_size": {"height": 24, "width": 24}}))
    with pytest.raises(CheckpointError, match=r"makes pictures \(3, 24, 24\), the tower reads \(3, 30, 30\)"):
        make(SOURCE, parts[0], tower, parts[2])
    path.write_text(json.dumps({"image_processor_type": "NoSuchProcessor"}))
    with pytest.raises(CheckpointError, match=r"transformers cannot read its preprocessor_config.json"):
        make(SOURCE, parts[0], tower, parts[2])
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json"):
        make(SOURCE, parts[0], tower, parts[2])
    (tower / "processor_config.json").write_text(json.dumps({"image_processor": shown}))
    assert files.read_json(make(SOURCE, parts[0], tower, parts[2]) / path.name) == shown


# Links


def test_towers_tied_models_and_llava_folders_can_be_linked(make, maker, parts):
    for folder in (parts[1], maker.foreign("Qwen2", tied=True), maker.llava()):
        linked = make({"kind": "folder", "path": str(folder)})

        assert merkle(FolderTensors(linked)) == merkle(FolderTensors(folder))
        assert {path.name for path in folder.iterdir()} <= {path.name for path in linked.iterdir()} | {
            "plait.json"
        }


def test_a_folder_that_transformers_5_has_written_is_the_same_model(make, maker, tmp_path):
    source = maker.llava()
    model = loaded(source)
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(tmp_path)
    processor_of(source).save_pretrained(tmp_path)
    assert any(
        name.startswith("vision_tower.embeddings") for name in load_file(tmp_path / "model.safetensors")
    )

    linked = make({"kind": "folder", "path": str(tmp_path)})

    assert merkle(FolderTensors(linked)) == merkle(FolderTensors(source))
    assert (linked / "preprocessor_config.json").is_file()


# SOLO's projection


def test_solos_projection_can_come_from_a_file(make, maker, tmp_path):
    source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}
    given = torch.randn(32, 48)
    save_file({"model.embed_vision_patch.weight": given}, tmp_path / "dproj.safetensors")
    source |= {"projection": str(tmp_path / "dproj.safetensors")}

    built = FolderTensors(make(source, maker.hf(), maker.vision))

    assert torch.equal(built["model.embed_vision_patch.weight"], given)
    with pytest.raises(CheckpointError, match=r"has shape \(32, 48\), its config says \(32, 75\)"):
        make({**source, "patch_size": 5}, maker.hf(), maker.vision)
