"""Parts of a LLaVA that are broken or of another kind end in a sentence; ``dtype`` casts as torch does."""

import json
import logging
import shutil

import pytest
import torch
from makers import Maker
from safetensors.torch import load_file, save_file

from plait import files
from plait.errors import CheckpointError, DataError, PlaitError
from plait.models.weights import FolderTensors

SOURCE = {"kind": "llava", "base": "b", "vision": "v", "tokenizer": "t"}
WEIGHTS, PREPROCESSOR = "model.safetensors", "preprocessor_config.json"


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def parts(maker, tmp_path):
    """Copies of a base and a tower, to break, and a tokenizer."""
    base, tower = (shutil.copytree(f(), tmp_path / f.__name__) for f in (maker.hf, maker.tower))
    return {"base": base, "vision": tower, "tokenizer": maker.image}


def shortened(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def written(text):
    return lambda path: path.write_text(text)


def changed(**values):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN = {
    "a cut header": (WEIGHTS, shortened(1500), "no whole safetensors file"),
    "a cut tensor": (WEIGHTS, shortened(-50), "no whole safetensors file"),
    "no bytes": (WEIGHTS, shortened(0), r"\(0 bytes\) is no whole safetensors file"),
    "a config that is a list": ("config.json", written("[]"), "holds a JSON list, expected an object"),
    "no heads": (
        "config.json", changed(num_attention_heads=0), "num_attention_heads is 0, expected a whole number",
    ),
    "negative layers": ("config.json", changed(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "a size in words": ("config.json", changed(hidden_size="32"), "hidden_size is '32', expected a whole"),
}  # fmt: skip


@pytest.mark.parametrize("part", ["base", "vision"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_is_a_sentence(make, parts, part, name):
    file, breaks, sentence = BROKEN[name]
    breaks(parts[part] / file)

    with pytest.raises(PlaitError, match=rf"{parts[part].name}.*{sentence}"):
        make(SOURCE, *parts.values())


@pytest.mark.parametrize(
    ("part", "file", "breaks", "sentence"),
    [
        ("base", "tokenizer.json", written("{}"), "has no model with a vocabulary"),
        ("base", "config.json", changed(num_key_value_heads=-1), "num_key_value_heads is -1"),
        ("base", "config.json", changed(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
        ("base", "config.json", changed(rope_theta=[]), r"rope_theta is \[\]"),
        ("base", "config.json", changed(rope_parameters=[1]), r"rope_parameters is \[1\]"),
        ("base", "config.json", changed(architectures="Llama"), "is of architecture Llama"),
        ("vision", "config.json", changed(patch_size=0), "patch_size is 0"),
        ("vision", "config.json", changed(image_size=[30, 30]), r"image_size is \[30, 30\]"),
        ("vision", "config.json", changed(num_hidden_layers=1), "needs two layers or more"),
        ("vision", "config.json", changed(model_type="clip", vision_config=[1]), r"vision_config is \[1\]"),
        ("vision", PREPROCESSOR, written("[]"), "holds a JSON list"),
        ("vision", PREPROCESSOR, changed(image_mean=[0.5]), "or prepare a picture by it: mean must have 3"),
    ],
)
def test_what_only_one_part_has_is_a_sentence(make, parts, part, file, breaks, sentence):
    breaks(parts[part] / file)

    with pytest.raises(PlaitError, match=sentence):
        make(SOURCE, *parts.values())


def test_a_part_of_another_kind_is_a_sentence(make, maker, parts):
    base, tower, tokenizer = parts.values()
    llava = maker.llava()
    for given, sentence in (
        ((tower, tower, tokenizer), "is of architecture CLIPVisionModel"),
        ((base, base, tokenizer), "has a vision tower of type 'mistral'"),
        ((base, llava, tokenizer), "has a vision tower of type 'llava'"),
        ((llava, tower, tokenizer), "is a LlavaForConditionalGeneration"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            make(SOURCE, *given)


def test_a_tower_of_one_layer_is_refused_with_its_weights_whole(make, maker, parts):
    with pytest.raises(CheckpointError, match="a tower needs two layers or more"):
        make(SOURCE, parts["base"], maker.tower("clip-one", num_hidden_layers=1), parts["tokenizer"])


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_llava_config_with_a_part_that_is_no_object_is_a_sentence(make, maker, tmp_path, part):
    folder = shutil.copytree(maker.llava(), tmp_path / "llava")
    changed(**{part: "mistral"})(folder / "config.json")

    with pytest.raises((CheckpointError, DataError), match=f"{part} is 'mistral', expected an object"):
        make({"kind": "folder", "path": str(folder)})


# dtype


def recast(folder, dtype):
    """A part whose weights are of another type."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    changed(dtype=str(dtype).removeprefix("torch."))(folder / "config.json")


@pytest.mark.parametrize(
    ("dtype", "torchs"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtype_casts_every_weight_as_torch_does(make, parts, tmp_path, dtype, torchs, caplog):
    from transformers import AutoModelForImageTextToText

    recast(parts["base"], torch.bfloat16)
    drawn = FolderTensors(make(SOURCE, *parts.values()))
    given = {name: drawn[f"multi_modal_projector.{name}"].float() for name in ("linear_1.weight",)}
    given |= {"linear_2.weight": torch.randn(32, 32)}
    save_file(given, tmp_path / "p.safetensors")
    keys = {"dtype": dtype, "projector": str(tmp_path / "p.safetensors"), "projector_bias": False}

    caplog.set_level(logging.INFO, "plait")
    folder = make({**SOURCE, **keys}, *parts.values())

    built = FolderTensors(folder)
    assert {tensor.dtype for tensor in built.values()} == {torchs}
    sources = {f"language_model.{name}": tensor for name, tensor in FolderTensors(parts["base"]).items()}
    sources |= {f"vision_tower.vision_model.{n}": t for n, t in FolderTensors(parts["vision"]).items()}
    sources |= {f"multi_modal_projector.{name}": tensor for name, tensor in given.items()}
    assert sources.keys() == built.keys()
    for name, tensor in sources.items():
        assert torch.equal(built[name][: len(tensor)], tensor.to(torchs)), name
    assert files.read_json(folder / "config.json")["dtype"] == str(torchs).removeprefix("torch.")
    assert {
        p.dtype for p in AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").parameters()
    } == {torchs}
    assert not any("several types" in record.getMessage() for record in caplog.records)


def test_without_dtype_nothing_is_cast_and_a_mixture_is_one_line(make, parts, caplog):
    caplog.set_level(logging.INFO, "plait")
    recast(parts["base"], torch.bfloat16)

    built = FolderTensors(make(SOURCE, *parts.values()))

    for part, prefix in (("base", "language_model."), ("vision", "vision_tower.vision_model.")):
        for name, tensor in FolderTensors(parts[part]).items():
            assert torch.equal(built[prefix + name][: len(tensor)], tensor)
            assert built[prefix + name].dtype == tensor.dtype
    lines = [r.getMessage() for r in caplog.records if "several types" in r.getMessage()]
    assert len(lines) == 1
    assert "language_model bfloat16" in lines[0]
    assert "vision_tower float32" in lines[0]


def test_the_drawn_projector_of_a_dtype_is_cast_once(make, parts):
    recast(parts["base"], torch.bfloat16)

    half, full = (FolderTensors(make({**SOURCE, "dtype": d}, *parts.values())) for d in ("fp16", "fp32"))

    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(half[name], full[name].half())
    assert not torch.equal(full[name], full[name].bfloat16().float())
