"""Configs of real transformers models, read and refused."""

import json

import pytest
from hypothesis import given
from strategies import specs
from transformers import LlavaConfig

from plait.errors import CheckpointError
from plait.models.specs import Spec
from plait.models.weights import FolderTensors

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


@pytest.mark.parametrize("name", ["Mistral", "Llama", "Qwen2", "Qwen3"])
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


@pytest.mark.parametrize("experts", [{}, {"num_local_experts": 3, "num_experts_per_tok": 3}])
def test_a_mixtral_has_the_tensors_that_transformers_writes(experts, tmp_path):
    import transformers

    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **experts))
    model.save_pretrained(tmp_path)

    spec = Spec.of(tmp_path)

    assert spec.shapes == FolderTensors(tmp_path).shapes
    assert (spec.num_experts, spec.experts_per_token) == ((3, 3) if experts else (8, 2))
    assert spec.sliding_window is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts_per_tok": 1}, "sends a token to 1 of 8 experts; Megatron's router weighs 2 or more"),
        ({"num_experts_per_tok": 3, "num_local_experts": 2}, "sends a token to 3 of 2 experts"),
        ({"router_jitter_noise": 0.1}, "has router_jitter_noise, which plait does not train with"),
    ],
)
def test_a_mixtral_that_megatron_routes_otherwise_is_refused(changes, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Spec.from_config(written(architectures=["MixtralForCausalLM"], **changes))


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
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"mlp_bias": True}, "has mlp_bias"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"scales its rotary embedding \('dynamic'\)"),
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_sliding_window": True}, "has use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has use_sliding_window"),
    ],
)
def test_a_qwen2_with_windows_is_refused(change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Spec.from_config(written(architectures=["Qwen2ForCausalLM"], **change))


def seeing(text=(), vision=(), **changes):
    """A LLaVA config."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", **dict(text)},
        "vision_config": {"model_type": "clip_vision_model", **dict(vision)},
        **changes,
    }


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (seeing(text={"model_type": "gemma"}), "has a language model of type 'gemma'"),
        (seeing(vision={"model_type": "pixtral"}), "has a vision tower of type 'pixtral'"),
        (seeing(vision_config=None), "has no vision_config"),
        (seeing(text={"tie_word_embeddings": "no"}), "tie_word_embeddings is 'no', expected true or false"),
        (seeing(tie_word_embeddings="no"), "tie_word_embeddings is 'no', expected true or false"),
        (seeing(text={"mlp_bias": True}), "has mlp_bias"),
        (seeing(projector_hidden_act="relu"), "has projector_hidden_act 'relu', not gelu"),
        (seeing(vision_feature_layer=[-2, -5]), r"projects hidden state \[-2, -5\]"),
        (seeing(vision_feature_layer=-3), "projects hidden state -3; plait knows -2 and -1"),
        (seeing(vision={"hidden_act": "relu"}), "a tower with hidden_act 'relu' and 3 channels"),
        (seeing(vision={"num_channels": 1}), "a tower with hidden_act 'quick_gelu' and 1 channels"),
        (seeing(vision={"model_type": "siglip_vision_model"}), "set vision_feature_select_strategy to full"),
        (seeing(vision={"image_size": [224, 336]}), r"image_size is \[224, 336\], expected a whole number"),
        (seeing(vision={"image_size": 31}), "no patch of 32 pixels fits into a picture of 31"),
        (seeing(vision={"num_attention_heads": 7}), "a tower of width 768 does not divide into 7 heads"),
        (seeing(vision={"num_hidden_layers": 1}), "a tower needs two layers or more"),
    ],
)
def test_a_llava_that_cannot_be_converted_is_refused_by_a_sentence(config, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Spec.from_config(config)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (seeing(), False),
        (seeing(text={"tie_word_embeddings": False}, tie_word_embeddings=False), False),
        (seeing(text={"tie_word_embeddings": True}, tie_word_embeddings=False), True),
        (seeing(text={"tie_word_embeddings": True}), True),
        (seeing(tie_word_embeddings=True), True),
    ],
)
def test_a_llava_is_tied_where_transformers_ties_it(config, tied):
    """transformers 4 says it of the language model alone, transformers 5 of both."""
    spec, theirs = Spec.from_config(config), LlavaConfig(**config)
    assert spec.tied == spec.lm.tied == theirs.tie_word_embeddings == tied
    assert ("language_model.lm_head.weight" in spec.shapes) != tied


def test_the_parts_of_a_llava():
    spec = Spec.from_config(seeing(text={"hidden_size": 64}, projector_hidden_size=96, image_token_index=7))

    assert spec.lm.shapes == {
        name.removeprefix("language_model."): shape
        for name, shape in spec.shapes.items()
        if name.startswith("language_model.")
    }
    assert (spec.lm.architecture, spec.lm.vision, spec.lm.lm) == ("LlamaForCausalLM", None, spec.lm)
    assert (spec.projector.input_size, spec.projector.hidden_size, spec.projector.output_size) == (
        768,
        96,
        64,
    )
    assert (spec.image_token_id, spec.norm) == (7, "language_model.model.norm.weight")
    assert (spec.vision.used_layers, spec.vision.head_dim, spec.vision.positions) == (11, 64, 50)


@given(specs())
def test_a_spec_survives_its_config(spec):
    assert Spec.from_config(json.loads(json.dumps(spec.config))) == spec
