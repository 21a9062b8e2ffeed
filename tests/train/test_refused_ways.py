"""Planning refuses a way to spread a run with its reason, and Megatron Core could not have run it."""

import pytest
from makers import Maker
from spread import KEYS, Way, recipes
from test_matrix import AGAIN, CP, DP, EP, PP, RECIPES, TP, VPP, WAYS

from plait.config.run import Run
from plait.config.spread import REFUSED, undivided
from plait.errors import ProofError

PAIRS = {
    "sequence parallel alone": (
        {"sequence_parallel": True},
        "`sequence_parallel` needs tensor_model_parallel_size 2",
        "Cannot use sequence parallelism without tensor parallelism",
    ),
    "weights gathered of a whole optimizer": (
        {DP: 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
        "`overlap_param_gather` needs `use_distributed_optimizer` and `overlap_grad_reduce`",
        "AssertionError",
    ),
    "a distributed optimizer without moments": (
        {DP: 2, "use_distributed_optimizer": True, "optimizer": "sgd", "adam_eps": 1e-8},
        "shares the state of `optimizer: adam` only, not of 'sgd'",
        "Only Adam and HybridDeviceOptimizer currently supported",
    ),
    "experts of no processes": (
        {DP: 2, EP: 4},
        "expert_model_parallel_size 4 does not divide data_parallel_size 2 x context_parallel_size 1",
        "is not divisible by",
    ),
    "chunks of one stage": (
        {VPP: 2},
        "virtual_pipeline_model_parallel_size 2 needs pipeline_model_parallel_size 2 or more",
        "should be greater than 1 with interleaved schedule",
    ),
    "an odd micro-batch": (
        {PP: 2, VPP: 2, "global_batch_size": 3},
        "multiples of pipeline_model_parallel_size 2, and the run has 3: global_batch_size 3 /",
        "it introduces dependency bubbles in the pipeline",
    ),
    "stages moved away": (
        {PP: 2, "cpu_offloading_num_layers": 1},
        "cpu_offloading_num_layers 1 needs pipeline_model_parallel_size 1, not 2",
        "no support for Pipeline parallelism with CPU offloading",
    ),
    "moved away and computed again": (
        {"cpu_offloading_num_layers": 1, "recompute_granularity": "selective"},
        "cpu_offloading_num_layers 1 and recompute_granularity 'selective' exclude each other",
        "CPU offloading does not work when activation recomputation is enabled",
    ),
}  # fmt: skip
"""Of each row: keys that provoke it, what planning says, what Megatron Core says to the same keys."""
ENGINE = {"transformer_impl": "transformer_engine"}
ON_GPUS = {
    "a sequence of documents shared": (
        ENGINE | {CP: 2},
        "context_parallel_size 2 needs transformer_impl local: .* divides into 2 x 2 pieces",
    ),
    "documents in fp32": (
        ENGINE | {"attention_backend": "flash", "params_dtype": "fp32"},
        "attention_backend 'flash' computes in bf16 or fp16, and params_dtype is fp32",
    ),
    "angles of several sequences": (
        ENGINE | {"apply_rope_fusion": True, "micro_batch_size": 2},
        "`apply_rope_fusion` needs micro_batch_size 1, not 2",
    ),
    "a fused loss of equal bits": (
        {"cross_entropy_loss_fusion": True, "deterministic_mode": True},
        "`cross_entropy_loss_fusion` does not give equal bits, and `deterministic_mode` asks",
    ),
}
"""Of each other row: what Megatron Core says to its keys only a GPU could tell, if it says anything."""
LAYERS = 4
DIVIDE = {
    "too many chunks": (
        {PP: 2, VPP: 3},
        "pipeline_model_parallel_size 2 x virtual_pipeline_model_parallel_size 3 do not divide; the latter",
        "do not divide|divisible by vp_size",
    ),
    "pieces of chunks": (
        {PP: 2, VPP: 2, **AGAIN, "recompute_num_layers": 2},
        "x virtual_pipeline_model_parallel_size 2 are 1 in one piece, which recompute_num_layers 2",
        "IndexError",
    ),
    "pieces of stages": (
        {PP: 2, **AGAIN, "recompute_num_layers": 3},
        "4 layers on pipeline_model_parallel_size 2 are 2 in one piece, which recompute_num_layers 3",
        "IndexError",
    ),
    "all moved away": (
        {"cpu_offloading_num_layers": 4},
        "cpu_offloading_num_layers 4 must be below the model's 4 layers",
        "CPU offloading can be done only for layers less than 4",
    ),
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return recipes(Maker(tmp_path_factory.mktemp("made")))["chat"]


def unchecked(keys):
    """All keys of a run that planning would refuse."""
    return Run(**KEYS, recipe="chat").model_dump(mode="json") | keys


def test_every_row_is_provoked():
    assert {**PAIRS, **ON_GPUS}.keys() == REFUSED.keys()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", {**PAIRS, **ON_GPUS})
def test_what_does_not_go_together_is_refused(name, recipe):
    keys, sentence, *_ = (PAIRS | ON_GPUS)[name]
    with pytest.raises(ValueError, match=sentence):
        Run(**KEYS | keys, recipe=recipe)


@pytest.mark.long
@pytest.mark.parametrize("name", {**PAIRS, **DIVIDE})
def test_megatron_core_could_not_have_run_it(name, chat, tmp_path):
    keys, _, theirs = (PAIRS | DIVIDE)[name]
    with pytest.raises(ProofError, match=theirs):
        chat.run(Way(keys), tmp_path, unchecked(keys))


@pytest.mark.parametrize("name", DIVIDE)
def test_layers_that_do_not_divide_are_refused(name):
    keys, sentence, _ = DIVIDE[name]
    run = Run(**KEYS | keys, recipe="chat").model_dump()
    assert sentence in undivided(run, LAYERS, {})


def test_chunks_of_uneven_stages_are_refused():
    run = Run(**KEYS, **{PP: 2, VPP: 2}, recipe="chat").model_dump()
    assert "2 layers are given to the first or last stage" in undivided(
        run, LAYERS, {"first": 2, "last": None}
    )
    even = run | {VPP: None}
    assert not undivided(even, LAYERS, {"first": 1, "last": None})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", WAYS)
def test_what_is_trained_by_the_tests_is_accepted(name, recipe):
    run = Run(**KEYS, **WAYS[name], recipe=recipe).model_dump()
    assert not undivided(run, LAYERS, {})


def test_one_chunk_is_none():
    assert Run(**KEYS, **{VPP: 1}, recipe="chat") == Run(**KEYS, recipe="chat")
    assert Run(**KEYS, **{TP: 2, VPP: 1}, recipe="chat").virtual_pipeline_model_parallel_size is None
