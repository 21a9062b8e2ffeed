"""Each rank of each preset on the meta device: Megatron Core's model has the parameters cut for it."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from plait.config.model import load_file
from plait.convert import engine
from plait.convert.tables import carried
from plait.models.llava import config_of
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train import compat
from plait.train.build import DTYPES, build_model

PLANS = Path(__file__).parents[2] / "config/plans"
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 1e4, "sliding_window": 4096,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
}  # fmt: skip
LLM_JP = {
    **LLAMA, "vocab_size": 99584, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 40,
}  # fmt: skip
HUB = {
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.3": {
        **MISTRAL, "vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None,
    },
    "meta-llama/Llama-2-7b-hf": LLAMA,
    "llm-jp/llm-jp-3-13b-instruct": LLM_JP,
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
"""What the config.json of these models says."""
ADDED = {"vision": 5, "locations": 1024, "chatml": 2, "image": 2}
PARAMETERS = {
    "solo-mistral-7b": 7_241_732_096 + 2 * 1031 * 4096 + 3072 * 4096,
    "codeact-mistral-7b": 7_241_732_096 + 2 * 2 * 4096,
    "codeact-llama2-7b": 6_738_415_616 + 2 * 2 * 4096,
    "llava-mistral-7b": 7_248_023_552 + 2 * 2 * 4096 + 303_507_456 + 14336 * (1024 + 4096),
    "llava-jp-13b": 13_707_924_480 + 2 * 2 * 5120 + 428_225_600 + 1153 * 5120 + 5121 * 5120,
}
"""Published numbers of the parts, and what is added to them."""


def spec_of(config, name):
    """The shape of a model of a plan, as `plait build` would write it."""
    source = config.raw_hf[config.models[name].source if name in config.models else name]
    text = HUB[config.raw_hf[source.base].repo]
    added = sum(ADDED[group] for group in config.tokenizers[source.tokenizer].add)
    text = {**text, "vocab_size": text["vocab_size"] + added}
    if source.kind == "llava":
        vision = HUB[config.raw_hf[source.vision].repo]
        ids = {
            "image_token_id": (text["vocab_size"] - 2, "<image>"),
            "pad_token_id": (text["vocab_size"] - 1, "<pad>"),
        }
        return Spec.from_config(config_of(source, text, vision, ids))
    if source.kind == "solo":
        text |= {"architectures": ["SoloForCausalLM"], "vision_patch_size": source.patch_size}
    return Spec.from_config(text)


def outline(spec, grid, rank, dtype):
    """Names and shapes of the parameters that a rank of Megatron's grid has; nothing is allocated."""
    compat.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=len(grid))
    try:
        parallel_state.initialize_model_parallel(grid.tp, grid.pp, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        with torch.device("meta"):
            model = build_model(spec, grid, dtype=dtype)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.yaml")))
def test_every_rank_of_a_preset_has_the_parameters_that_are_cut_for_it(name):
    config = load_file(PLANS / f"{name}.yaml")
    for run in config.runs.values():
        spec = spec_of(config, run.model)
        grid = Grid(run.tensor_model_parallel_size, run.pipeline_model_parallel_size)
        for rank, place in enumerate(grid):
            theirs = outline(spec, grid, rank, DTYPES[run.params_dtype])
            assert theirs == engine.rank_shapes(spec, grid, *place)


@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(8, 1), Grid(1, 4), Grid(4, 2, first=15)], ids=str)
@pytest.mark.parametrize("name", ["solo-mistral-7b", "llava-mistral-7b"])
def test_every_rank_of_other_grids_too(name, grid):
    config = load_file(PLANS / f"{name}.yaml")
    spec = spec_of(config, next(iter(config.runs.values())).model)
    for rank, place in enumerate(grid):
        assert outline(spec, grid, rank, torch.bfloat16) == engine.rank_shapes(spec, grid, *place)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_as_many_parameters_as_its_published_parts(name):
    config = load_file(PLANS / f"{name}.yaml")
    spec = spec_of(config, next(iter(config.runs.values())).model)
    elements = sum(math.prod(shape) for shape in spec.shapes.values())
    assert elements == PARAMETERS[name]
    below = sum(math.prod(shape) for shape in engine.rank_shapes(spec, Grid()).values())
    padding = 2 * spec.hidden_size * (-spec.vocab_size % 128)
    left = sum(math.prod(shape) for shape in carried(spec).values())
    assert below == elements - left + padding
