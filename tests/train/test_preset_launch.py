"""What starts each preset on GPUs, as text: command, environment, image, config, names of weights."""

import json
from pathlib import Path

import pytest
import torch
from hub_configs import PLANS, config_of
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from test_every_key import SPEC

from plait import layout
from plait.config import Plan
from plait.config.model import load_file
from plait.config.run import Run
from plait.errors import ConfigError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train import build, launch, node
from plait.train.hardware import check_hardware
from plait.train.job import Job
from plait.verify.ranks import run_ranks

WORLDS = {
    "codeact-llama2-7b": (4, 1), "codeact-mistral-7b": (4, 1), "llava-jp-13b": (8, 1),
    "llava-mistral-7b": (8, 1), "smollm2-135m": (2, 1), "solo-mistral-7b": (8, 1),
}  # fmt: skip
"""Processes of each run and its nodes."""
GPU = {
    "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}  # fmt: skip
ENGINE = {"transformer_impl": "transformer_engine", "fp8": "hybrid", "attention_backend": "flash"}
RUNS = [(path.stem, run) for path in sorted(PLANS.glob("*.yaml")) for run in load_file(path).runs]


def job_of(preset, name, **keys):
    """A run of a preset as the workflow starts it, its steps being what they are."""
    plan = Plan(load_file(PLANS / f"{preset}.yaml"))
    settings = plan.settings(layout.Iteration(run=name, iteration=1)) | keys
    return plan, Job(
        str(plan.sharded(name)), "a", "s", f"data/ckpts/{name}/iter_0000001", settings, plan.around(name)
    )


def spec_of(config, model):
    """The shape of a run's language model, as it comes from afar."""
    source = config.raw_hf[config.models[model].source if model in config.models else model]
    return Spec.from_config(config_of(config.raw_hf[source.base] if hasattr(source, "base") else source))


def test_every_preset_is_here():
    assert sorted(WORLDS) == sorted({preset for preset, _ in RUNS})


@pytest.mark.parametrize(("preset", "name"), RUNS)
def test_the_command_and_what_stands_in_its_environment(preset, name, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    plan, job = job_of(preset, name)
    job, image = launch.chosen(job), plan.config.images.gpu
    processes, nodes = WORLDS[preset]

    assert image == "envs/gpu.sif"
    command = launch.command(job, image)
    assert command[:-1] == [
        "apptainer", "exec", "--pwd", str(Path.cwd()), "envs/gpu.sif", "python", "-m", "plait.train.node",
    ]  # fmt: skip
    assert Job(**json.loads(command[-1])) == job
    assert job.around["nodes"] == nodes
    assert node.torchrun(job, processes // nodes, ("--standalone",))[3:-1] == [
        "--standalone", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", f"--nproc-per-node={processes}",
        "-m", "plait.train.worker",
    ]  # fmt: skip
    found = node.environment(job, processes)
    assert {key: found.get(key) for key in GPU} == GPU
    inside = launch._environment(job, processes, image)
    assert inside["APPTAINER_NV"] == "true"
    bound = [Path(one.partition(":")[0]) for one in inside["APPTAINER_BIND"].split(",")]
    assert any(Path.cwd().is_relative_to(one) for one in bound)


@pytest.mark.parametrize(("preset", "name"), RUNS)
def test_megatrons_config_of_its_own_layers_and_of_transformer_engines(preset, name):
    plan, job = job_of(preset, name)
    spec = spec_of(plan.config, plan.run(name).model)
    keys = {"grid": job.grid, "dtype": build.DTYPES[job.settings["params_dtype"]]}
    local = build.transformer_config(spec.lm, run=job.settings, **keys)
    assert (local.transformer_impl, local.fp8, local.bf16) == ("local", None, True)

    other = build.transformer_config(spec.lm, run=job.settings | ENGINE, **keys)
    differ = {key for key, value in vars(local).items() if value != getattr(other, key)}
    assert differ == {*ENGINE, *(["window_size"] if spec.lm.sliding_window else [])}
    assert (other.fp8, other.attention_backend) == ("hybrid", AttnBackend.flash)
    assert other.num_layers == spec.lm.num_layers
    with pytest.raises(ConfigError, match="'transformer_engine' needs a GPU"):
        check_hardware(job.settings | ENGINE, gpu=False)
    check_hardware(job.settings | ENGINE, gpu=True, has=lambda _: True)


@pytest.mark.parametrize("preset", WORLDS)
def test_a_preset_can_be_planned_with_transformer_engine(preset):
    config = load_file(PLANS / f"{preset}.yaml")
    for run in config.runs.values():
        assert Run(**run.model_dump(exclude_unset=True) | ENGINE).fp8 == "hybrid"


def saved_names(spec):
    """By the name of each parameter, the one that a checkpoint has it by, and its whole shape there."""
    model = build.build_model(spec, Grid(), dtype=torch.float32)
    return {
        name: (saved.key, tuple(getattr(saved, "global_shape", ())))
        for name, saved in model.sharded_state_dict().items()
        if not name.endswith("_extra_state")
    }


def test_checkpoints_have_the_names_by_which_transformer_engine_asks():
    """Its layers hold a norm within the projection behind it, and Megatron's own are saved by these names."""
    rows = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    (names,) = run_ranks(saved_names, Grid(), SPEC)
    moved = {}
    for own, theirs in rows.items():
        key, shape = names[f"decoder.layers.0.{own}weight"]
        moved[own] = key
        assert key == f"decoder.layers.{theirs}weight"
        assert shape == (SPEC.num_layers, SPEC.hidden_size)
    assert sorted(moved) == ["input_layernorm.", "pre_mlp_layernorm."]
    left = {name.partition("layers.0.")[2] for name, _ in names.items() if "layers.0." in name}
    assert {name for name in left if name.startswith(tuple(rows))} == {f"{own}weight" for own in rows}
    assert names["decoder.layers.0.mlp.linear_fc2.weight"][0] == "decoder.layers.mlp.linear_fc2.weight"
