"""Keys that only a GPU can heed are refused here by name."""

import pytest

from plait.config.run import Run
from plait.errors import ConfigError
from plait.train.hardware import NEEDS_GPU, NEEDS_PACKAGE, check_hardware, installed

ENGINE = {"transformer_impl": "transformer_engine"}
WITH_GPU = {
    "transformer_impl": "transformer_engine",
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "gradient_accumulation_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
    "optimizer_cpu_offload": True,
    "params_dtype": "fp16",
}


def settings(**keys):
    run = Run(recipe="chat", model="m", mixture="x", train_iters=10, save_interval=10, **keys)
    return run.model_dump(mode="json")


def test_defaults_need_none():
    check_hardware(settings(), gpu=False)
    assert {key: settings()[key] for key in NEEDS_GPU} == {
        key: value for key, (value, _) in NEEDS_GPU.items()
    }


@pytest.mark.parametrize("key", WITH_GPU)
def test_seed_15_a_key_for_a_gpu_is_refused_without_one(key):
    run = settings(**{key: WITH_GPU[key]})
    with pytest.raises(ConfigError, match=f"{key} .* needs a GPU"):
        check_hardware(run, gpu=False)
    check_hardware(run, gpu=True, has=lambda _: True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fp8", "hybrid"),
        ("attention_backend", "flash"),
        ("moe_grouped_gemm", True),
        ("cpu_offloading_num_layers", 2),
        ("apply_rope_fusion", True),
    ],
)
def test_seed_15_a_key_that_no_layer_reads_is_refused_everywhere(key, value):
    for gpu in (False, True):
        with pytest.raises(ConfigError, match=f"{key} {value!r} would be read by Transformer Engine"):
            check_hardware(settings(**{key: value}), gpu=gpu)
        if gpu:
            check_hardware(settings(**ENGINE, **{key: value}), gpu=gpu, has=lambda _: True)


@pytest.mark.parametrize("key", NEEDS_PACKAGE)
def test_what_is_missing_is_named(key):
    run, asked = settings(**{key: WITH_GPU[key]}), []

    def has(package):
        asked.append(package)
        return False

    with pytest.raises(ConfigError, match=f"{key} .* needs a GPU .*, and this machine has none"):
        check_hardware(run, gpu=False, has=has)
    assert asked == []
    with pytest.raises(ConfigError, match=f"{key} .* needs the package {NEEDS_PACKAGE[key]}, which this env"):
        check_hardware(run, gpu=True, has=has)
    assert asked == [NEEDS_PACKAGE[key]]


def test_this_environment_has_no_transformer_engine():
    """Its mere presence would break the import of Megatron Core here."""
    assert installed("megatron")
    assert not installed("transformer_engine")
    with pytest.raises(ConfigError, match="needs the package transformer_engine"):
        check_hardware(settings(**ENGINE), gpu=True)
