"""Families of language models: tables of fields, read both ways; nothing unknown passes, nothing is lost."""

import json
from dataclasses import fields

import pytest
import torch
from makers import Maker
from safetensors.torch import load_file, save_file

from plait import files
from plait.convert import tables
from plait.convert.forms import coverage
from plait.errors import CheckpointError
from plait.models.families import BY_ARCHITECTURE
from plait.models.families.fields import INERT
from plait.models.families.rope import Rope
from plait.models.specs import Spec
from plait.models.weights import FolderTensors, merkle

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 77,
}  # fmt: skip
OF_SOLO = {"vision_patch_size": 4, "vision_token_ids": {"<vision>": 5}}
LLAMA3 = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
SHORT = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
SCALED = Rope(kind="llama3", **LLAMA3)


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("families"))


def config(architecture="LlamaForCausalLM", **changes):
    return {
        "architectures": [architecture],
        **SIZES,
        **(OF_SOLO if architecture == "SoloForCausalLM" else {}),
        **changes,
    }


# Published configs, each as the hub has it


PUBLISHED = {
    "SmolLM2-135M": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
            "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
            "transformers.js_config": {"dtype": "q4"}, "use_cache": True, "vocab_size": 49152,
        },
        {"tied": True, "rope_theta": 1e5, "head_dim": 64, "dtype": "bfloat16", "rope": Rope()},
        134_515_008,
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
        },
        {"tied": True, "rope_theta": 5e5, "rope": SCALED, "sliding_window": None},
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
        },
        {"tied": False, "sliding_window": 4096, "rope_theta": 1e4},
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
            "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
            "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        {"tied": True, "attention_bias": True, "sliding_window": None},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
            "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        {"tied": True, "qk_norm": True, "head_dim": 128, "query_size": 2048},
        596_049_920,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    published, expected, parameters = PUBLISHED[name]

    spec = Spec.from_config(published)

    assert {key: getattr(spec, key) for key in expected} == expected
    assert sum(torch.Size(shape).numel() for shape in spec.shapes.values()) == parameters
    assert Spec.from_config(spec.config) == spec


# The tables


@pytest.mark.parametrize("architecture", [name for name in BY_ARCHITECTURE if name != "SoloForCausalLM"])
def test_every_field_of_transformers_config_class_has_its_row(architecture):
    """A field that transformers adds is not overlooked: its family does not know it."""
    import transformers

    family = BY_ARCHITECTURE[architecture]
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    base = {one.name for one in fields(transformers.PretrainedConfig)}
    own = {one.name for one in fields(kind)} - base

    assert own <= family.known | INERT
    stock = kind()
    assert stock.model_type == family.model_type
    assert {key: getattr(stock, key) for key in family.defaults} == dict(family.defaults)
    assert stock.default_theta == family.theta


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_what_a_config_leaves_out_is_what_transformers_takes(architecture):
    spec = Spec.from_config(config(architecture))
    optional = {row.config: row for row in BY_ARCHITECTURE[architecture].fields if row.optional}

    for name, row in optional.items():
        if name in BY_ARCHITECTURE[architecture].defaults and name not in SIZES:
            assert getattr(spec, row.spec) == BY_ARCHITECTURE[architecture].defaults[name]
    assert spec.rope_theta == BY_ARCHITECTURE[architecture].theta
    assert not spec.tied


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_a_family_is_in_one_row_of_its_table(architecture, tied):
    """The proof of coverage tells what is missing."""
    spec = Spec.from_config(config(architecture, tie_word_embeddings=tied))
    found = coverage(spec)

    assert found["hf_tensors"] == len(spec.shapes)
    assert ("lm_head.weight" in spec.shapes) == (not tied)
    names = {entry.mcore for entry in tables.entries(spec)}
    assert ("output_layer.weight" in names) == (not tied)


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_an_unknown_field_is_refused_by_its_name(architecture):
    known = config(architecture)
    Spec.from_config(known | {"logit_softcap": None, "qk_layer_norms": False, "pruned_heads": {}})

    for odd in ({"logit_softcap": 30.0}, {"quantization_config": {"bits": 4}}, {"residual_multiplier": 0.2}):
        with pytest.raises(CheckpointError, match=f"has {next(iter(odd))}, which plait does not know"):
            Spec.from_config(known | odd)


def test_unknown_fields_of_a_llava_and_its_parts_are_refused_by_name():
    seeing = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "qwen3", "hidden_size": 64},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    assert Spec.from_config(seeing).lm.qk_norm
    for part in (None, "text_config", "vision_config"):
        odd = {**(seeing[part] if part else seeing), "soft_tokens": 3}
        with pytest.raises(CheckpointError, match="has soft_tokens, which plait does not know"):
            Spec.from_config({**seeing, part: odd} if part else odd)


def test_a_model_type_of_another_architecture_is_refused():
    with pytest.raises(
        CheckpointError, match="is of architecture LlamaForCausalLM and of model_type 'qwen2'"
    ):
        Spec.from_config(config(model_type="qwen2"))


@pytest.mark.parametrize(
    ("architecture", "kinds", "sentence"),
    [
        ("LlamaForCausalLM", ["sliding_attention"] * 3, "all layers of such a model attend to all tokens"),
        ("MistralForCausalLM", ["full_attention", "sliding_attention"], "has layer_types of several kinds"),
        ("Qwen3ForCausalLM", ["full_attention", "sliding_attention"], "has use_sliding_window"),
    ],
)
def test_layers_that_see_otherwise_than_the_others_are_refused(architecture, kinds, sentence):
    Spec.from_config(config(architecture, layer_types=["full_attention"] * 3))
    with pytest.raises(CheckpointError, match=sentence):
        Spec.from_config(config(architecture, layer_types=kinds))


# Rotary embeddings of transformers 4 and 5


@pytest.mark.parametrize(
    ("written", "theta", "rope"),
    [
        ({}, 10000.0, Rope()),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, Rope()),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5e5, SCALED),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 5e5, SCALED),
        ({"rope_theta": 5e5, "rope_parameters": {"type": "linear", "factor": 4}}, 5e5,
         Rope(kind="linear", factor=4)),
        ({"rope_scaling": {"type": "llama3", **SHORT}}, 10000.0,
         Rope(kind="llama3", **SHORT, original_max_position_embeddings=77)),
    ],
)  # fmt: skip
def test_rope_parameters_of_transformers_4_and_5(written, theta, rope):
    import transformers

    spec = Spec.from_config(config(**written))

    assert (spec.rope_theta, spec.rope) == (theta, rope)
    theirs = transformers.LlamaConfig(**{k: v for k, v in spec.config.items() if k != "architectures"})
    assert theirs.rope_parameters == spec.config["rope_parameters"]
    assert Spec.from_config({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]}) == spec


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"\('yarn'\), which plait cannot convert yet"),
        ({"rope_scaling": {"type": "linear"}}, "of kind 'linear' lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 2}}, "has attention_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "has full_attention"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "is not above low_freq"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "has two of rope_theta: 10000.0 and"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
         "has rope_scaling and rope_parameters, and they differ"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "partial_rotary_factor 0.2"),
        ({"rope_interleaved": True}, "has rope_interleaved"),
    ],
)  # fmt: skip
def test_rotary_embeddings_that_are_not_computed_are_refused(written, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Spec.from_config(config(**written))


# Tied embeddings


def with_head(maker, folder, values):
    """The tied model with an output layer in its file, as some published ones have."""
    folder.mkdir()
    base = maker.foreign("Llama", tied=True)
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = values(weights["model.embed_tokens.weight"].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_output_layer_that_is_the_embedding_is_left_out_by_name(maker, tmp_path):
    from plait.convert import folders

    source = with_head(maker, tmp_path / "copied", lambda embedding: embedding)
    found = FolderTensors(source)

    assert found.dropped == ("lm_head.weight",)
    assert "lm_head.weight left out: it is the embedding" in found.note
    assert found.shapes == Spec.of(source).shapes
    facts = folders.convert(source, tmp_path / "whole")
    assert facts["merkle"] == merkle(FolderTensors(maker.foreign("Llama", tied=True)))


def test_an_output_layer_that_only_says_that_it_is_tied_is_refused(maker, tmp_path):
    source = with_head(maker, tmp_path / "other", lambda embedding: embedding + 1)

    with pytest.raises(
        CheckpointError, match="ties its output layer to the embedding, and holds another one"
    ):
        FolderTensors(source)


def test_a_pickle_of_a_tied_model_whose_tensors_are_one_is_linked(make, maker, tmp_path, caplog):
    """As torch.save writes the state of such a model: two names of one storage."""
    source = maker.foreign("Llama", tied=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "plait.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")

    with caplog.at_level("INFO"):
        folder = make({"kind": "folder", "path": str(tmp_path)})

    assert "lm_head.weight left out: it is the embedding" in caplog.text
    assert merkle(FolderTensors(folder)) == merkle(FolderTensors(source))


def test_a_tied_base_stays_tied_when_it_gets_tokens(make, tokenizers, maker):
    folder = make(
        {"kind": "extend", "base": "b", "tokenizer": "t", "new_rows": "normal"},
        maker.foreign("Qwen3", tied=True, head_dim=12),
        tokenizers["chat"],
    )
    spec = Spec.of(folder)

    assert (spec.tied, spec.vocab_size) == (True, 261)
    assert FolderTensors(folder).shapes == spec.shapes
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_the_config_of_a_converted_model_is_the_sources_byte_for_byte(maker):
    source = maker.foreign("Qwen2", tied=True)
    written = (source / "config.json").read_bytes()

    for folder in (maker.megatron(source), maker.shards(source, 2, 1)):
        assert (folder / "hf_config.json").read_bytes() == written
    assert files.read_manifest(maker.megatron(source))["facts"]["merkle"]
