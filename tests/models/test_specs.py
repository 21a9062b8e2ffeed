"""Configs of real transformers models, read and refused."""

import json

import pytest
from hypothesis import given
from strategies import specs

from plait.errors import CheckpointError
from plait.models.specs import Spec

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 77,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


@pytest.mark.parametrize("name", ["Mistral", "Llama"])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_shapes_are_those_of_the_transformers_model(name, head_dim, tmp_path):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, head_dim=head_dim)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(tmp_path)

    spec = Spec.of(tmp_path)

    assert spec.shapes == {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert (spec.rope_theta, spec.rms_norm_eps, spec.max_position_embeddings) == (5e5, 1e-6, 77)
    assert spec.sliding_window == (4096 if name == "Mistral" else None)
    assert spec.dtype == "float32"


def written(**changes):
    """A config as transformers 4 writes it."""
    old = {key: value for key, value in SIZES.items() if key != "rope_parameters"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "rope_theta": 1e6,
        **old,
        **changes,
    }


def test_configs_of_transformers_4_are_read():
    spec = Spec.from_config(written(rope_scaling=None, head_dim=None))

    assert (spec.rope_theta, spec.dtype, spec.head_dim) == (1e6, "bfloat16", 8)


def test_no_key_value_heads_means_as_many_as_heads():
    assert Spec.from_config(written(num_key_value_heads=None)).num_key_value_heads == 4


def test_what_a_config_leaves_out_has_the_default_of_transformers():
    config = written(architectures=["MistralForCausalLM"])
    del config["rope_theta"]
    spec = Spec.from_config(config)

    assert (spec.rope_theta, spec.sliding_window) == (10000.0, 4096)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "is of architecture GPT2LMHeadModel"),
        ({"architectures": None}, "is of architecture none"),
        ({"tie_word_embeddings": True}, "ties the output layer"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"mlp_bias": True}, "has mlp_bias"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"scales its rotary embedding \('linear'\)"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
            r"scales its rotary embedding \('yarn'\)",
        ),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"architectures": ["SoloForCausalLM"]}, "has no vision_patch_size"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_a_sentence(change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Spec.from_config(written(**change))


@given(specs())
def test_a_spec_survives_its_config(spec):
    config = {
        "architectures": [spec.architecture],
        "num_hidden_layers": spec.num_layers,
        "vision_patch_size": round((spec.patch_dim / 3) ** 0.5),
        **vars(spec),
    }
    assert Spec.from_config(json.loads(json.dumps(config, default=str))) == spec
