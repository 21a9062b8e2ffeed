"""What the line on a run's disk says of a model with frozen parts, beside its parameters' shapes."""

import json
import math
import re

import pytest
from hub_configs import HUB, LLAMA

from plait.config.model import load
from plait.config.plan import Plan
from plait.config.room import parameters, said, trained
from plait.models.specs import LANGUAGE_MODEL, PROJECTOR, TOWER, Spec

PREFIXES = {"language_model": LANGUAGE_MODEL, "vision_model": TOWER, "vision_projection": PROJECTOR}
CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"
RUN = {"recipe": "llava", "mixture": "x", "train_iters": 10, "save_interval": 10, "lr": 1e-3}
FROZEN = [
    (),
    ("vision_model",),
    ("language_model", "vision_model"),
    ("vision_projection",),
    ("language_model",),
]


def counts(config):
    """Parameters of each part, by their shapes; nothing computes with SigLIP's head."""
    shapes = Spec.from_config(config).shapes
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(f"{TOWER}head.")}
    return {
        part: sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
        for part, prefix in PREFIXES.items()
    }


def folder(path, config, numbers):
    """A model folder of the right size without anything in it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(2 * numbers)
    return {"kind": "folder", "path": str(path)}


def planned(raw_hf, model, tokenizers=None, **keys):
    run = RUN | {"model": model, "global_batch_size": 4, "micro_batch_size": 1} | keys
    form = {"tokenizer": "t", "template": "llava", "picture_tokens": 576}
    mixture = {"format": "f", "decoder_seq_length": 1024, "datasets": ["d"]}
    return Plan(
        load(
            {
                "datasets": {"d": {"source": {"kind": "llava-json", "path": "d"}, "energon": {}}},
                "tokenizers": tokenizers or {"t": {"kind": "model", "model": model}},
                "formats": {"f": form},
                "mixtures": {"x": mixture},
                "raw_hf": raw_hf,
                "runs": {"r": run},
            }
        )
    )


def llava(tower, **keys):
    vision = {"vision_feature_select_strategy": "full"} if tower == SIGLIP else {}
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": LLAMA,
        "vision_config": HUB[tower], "vision_feature_layer": -1, **vision, **keys,
    }  # fmt: skip


@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize(
    "config", [llava(CLIP), llava(SIGLIP, projector_hidden_size=1000)], ids=["clip", "siglip"]
)
def test_what_is_trained_is_what_the_shapes_say(config, freeze, tmp_path):
    numbers = counts(config)
    source = folder(tmp_path / "m", config, sum(numbers.values()))
    plan = planned({"m": source}, "m", freeze=freeze)
    whole = parameters(plan, "m")
    expected = sum(number for part, number in numbers.items() if part not in freeze)

    assert whole == sum(numbers.values())
    assert trained(plan, "m", freeze, whole) == pytest.approx(expected, rel=0.02)
    weights, optimizer = figures(said(plan, "r", [10]))
    assert weights == pytest.approx(2 * whole / 1e9, rel=0.01)
    assert optimizer == pytest.approx(12 * expected / 1e9, rel=0.03)


def figures(line):
    found = re.search(r"about (\S+) GB of weights and (\S+) GB of optimizer each", line)
    return tuple(map(float, found.groups()))


def test_a_model_that_is_still_to_be_built_is_known_by_what_it_is_built_of(tmp_path):
    numbers = counts(llava(CLIP, projector_hidden_size=14336))
    raw_hf = {
        "lm": folder(tmp_path / "lm", LLAMA, numbers["language_model"]),
        "clip": folder(tmp_path / "clip", HUB[CLIP], numbers["vision_model"]),
        "m": {
            "kind": "llava", "base": "lm", "vision": "clip", "tokenizer": "t", "projector_hidden_size": 14336,
        },
    }  # fmt: skip
    tokenizers = {
        "lm": {"kind": "model", "model": "lm"}, "t": {"kind": "extend", "base": "lm", "add": ["image"]}
    }  # fmt: skip
    plan = planned(raw_hf, "m", tokenizers, stage=1)
    _, optimizer = figures(said(plan, "r", [10]))
    assert optimizer == pytest.approx(12 * numbers["vision_projection"] / 1e9, rel=0.01)


def test_where_nothing_tells_of_parts_all_counts_as_trained(tmp_path):
    config = llava(CLIP) | {"vision_config": {"model_type": "clip_vision_model"}}
    plan = planned({"m": folder(tmp_path / "m", config, 1000)}, "m", freeze=("language_model",))
    assert trained(plan, "m", ("language_model",), 1000.0) == 1000.0
