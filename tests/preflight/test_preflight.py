"""`plait preflight`: what it says, what it refuses, and the tiny step."""

import math
import os
import re
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hub_configs import PLANS
from hypothesis import given
from hypothesis import strategies as st

from plait import files, layout
from plait.cli.main import main
from plait.config import Plan
from plait.config.model import load_file
from plait.config.run import AXES, world_size
from plait.convert import engine
from plait.errors import CheckpointError
from plait.models.specs import Spec
from plait.preflight import inputs, launched, shape, step
from plait.preflight.small import Small
from plait.train.launch import srun
from plait.train.node import ALONE, place, torchrun
from plait.train.rows import to_line

GOLDENS = Path(__file__).parent / "goldens"
DEFAULT = PLANS.parent / "config.yaml"
DEFAULT_PLAN = Plan(load_file(DEFAULT))
PRESETS = sorted(path.stem for path in PLANS.glob("*.yaml"))


def config_file(folder, name="chat-tiny", **keys):
    """The default plan with other keys of a run, in a file."""
    config = yaml.safe_load(DEFAULT.read_text())
    config["runs"][name] |= keys
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return "mine.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The launch


@pytest.mark.parametrize("name", PRESETS)
def test_the_launch_of_each_preset_is_as_stored(name, planned, monkeypatch):
    monkeypatch.setattr("plait.train.node._cores", lambda: 96)
    plan, lines = planned(name), []
    for run in plan.config.runs:
        job = launched.planned(plan, run)
        rows = [*launched.trained(plan, run, job), *launched.launched(plan, job, in_image=True)]
        said = [f"{title:<16}{text}".rstrip() for title, text in rows if not text.startswith("APPTAINER")]
        lines += [run, *said, ""]
    text = "\n".join(lines).replace(os.getcwd(), "/work")  # noqa: PTH109
    golden = GOLDENS / f"{name}.txt"
    if os.environ.get("REWRITE_GOLDENS"):
        golden.write_text(text)
    assert text == golden.read_text(), "the launch changed; `make goldens` rewrites it"


def test_several_nodes_are_started_by_srun_each_at_its_place(here):
    keys = {"tensor_model_parallel_size": 2, "nodes": 2, "network_interface": "ib0", "gpu_ids": [1, 3]}
    plan = Plan(load_file(config_file(here, **keys)))
    job = launched.planned(plan, "chat-tiny")
    rows = list(launched.launched(plan, job, in_image=False))
    said, found = dict(rows), [text for _, text in rows]

    assert said["starts"] == " ".join([*srun(2), "python -m plait.train.node JOB"])
    for node in range(2):
        words = torchrun(job, 2, place(node, 2, host="NODE0", port="PORT"))
        assert said[f"node {node}"] == " ".join(["python", *words[1:-1], "JOB"])
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "CUDA_VISIBLE_DEVICES=1,3"} <= set(found)
    assert "nodes 2" in said["slurm"]
    assert ALONE == ("--standalone",)


def test_who_starts_ranks_by_the_environment_is_told_so(here):
    plan = Plan(load_file(config_file(here, launch="env")))
    rows = dict(launched.launched(plan, launched.planned(plan, "chat-tiny"), in_image=False))
    assert "MASTER_ADDR" in rows["starts"]
    assert "node 0" not in rows


# The inputs


def states(plan, run):
    return {str(one.artifact): one.state for one in inputs.inputs_of(plan, run)}


def test_what_nobody_released_cannot_be_had_and_what_the_hub_has_is_to_be_fetched(planned):
    plan = planned("llava-jp-13b")
    found = states(plan, "llavajp13b-tp4-pp1-dp2-stage1")
    assert found["data/raw/stage1"] == "cannot be had"
    assert found["data/analysis/captions"] == "is to be made"
    assert set(found.values()) == {"cannot be had", "is to be made", "is to be fetched"}
    later = states(plan, "llavajp13b-tp4-pp1-dp2-stage2")
    assert later["data/ckpts/llavajp13b-tp4-pp1-dp2-stage1/iter_0002000"] == "is to be made"
    assert later["data/raw/stage2"] == "cannot be had"


def test_an_input_stands_while_it_is_whole_and_made_by_these_settings(here):
    plan = Plan(load_file(DEFAULT))
    analysis = layout.Analysis(mixture="talk")
    folder = here / str(analysis)
    folder.mkdir(parents=True)
    (folder / "mixture.yaml").write_text("sources: []")
    files.write_manifest(folder, kind="analysis", settings=plan.settings(analysis))
    found = states(plan, "chat-tiny")
    assert found[str(analysis)] == "stands"
    assert "data/raw/dialogues" not in found

    (folder / "mixture.yaml").write_text("sources: [more]")
    assert states(plan, "chat-tiny")[str(analysis)] == "is to be made"
    files.write_manifest(folder, kind="analysis", settings={"version": 0})
    found = states(plan, "chat-tiny")
    assert found[str(analysis)] == "is to be made"
    assert found["data/raw/dialogues"] == "is to be made"


def test_a_path_that_is_not_there_is_named(here, capfd):
    config = yaml.safe_load(DEFAULT.read_text())
    config["datasets"]["dialogues"]["source"] = {"kind": "chat-jsonl", "path": "no/chats"}
    (here / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["preflight", "chat-tiny", "--config", "mine.yaml", "--no-step"]) == 2
    said = capfd.readouterr()
    assert "error: data/raw/dialogues cannot be had" in said.err
    assert "datasets.dialogues.source.path: no/chats does not exist" in said.err
    assert "cannot be had   1 raw" in said.out


# What is refused


def refused(capfd, *words):
    assert main(["preflight", *words]) == 2
    said = capfd.readouterr().err
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"tensor_model_parallel_size": 3}, "num_attention_heads 4 is not a multiple of tp 3"),
        ({"pipeline_model_parallel_size": 3}, "num_hidden_layers 4 is not a multiple of pp 3"),
        (
            {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            "virtual_pipeline_model_parallel_size 2, preflight knows whole stages",
        ),
        ({"global_batch_size": 5}, "global_batch_size 5 is not a multiple of micro_batch_size 2"),
    ],
)
def test_a_grid_or_a_batch_that_does_not_divide_is_one_sentence(here, capfd, keys, sentence):
    (line,) = refused(capfd, "chat-tiny", "--config", config_file(here, **keys), "--no-step")
    assert sentence in line


def test_a_run_that_does_not_fit_its_device_is_refused_by_both_numbers(here, capfd):
    words = ("chat-tiny", "--config", config_file(here), "--no-step")
    (line,) = refused(capfd, *words, "--device-memory", "0.05")
    assert re.fullmatch(r"error: a rank needs 0\.1 GB, a device has 0\.1 GB", line)
    assert main(["preflight", *words, "--device-memory", "80"]) == 0
    assert re.search(r"  sum +0\.\d\d\d of 80\.0\n", capfd.readouterr().out)


def test_a_model_whose_shape_is_not_here_names_the_file(here, capfd):
    (line,) = refused(
        capfd, "llavajp13b-tp4-pp1-dp2-stage1", "--config", str(PLANS / "llava-jp-13b.yaml"), "--no-step"
    )
    assert "config.json of llm-jp/llm-jp-3-13b-instruct, which is not here" in line


def test_sequences_and_pictures_that_the_model_does_not_have_are_refused(here, capfd):
    config = yaml.safe_load(DEFAULT.read_text())
    config["raw_hf"]["Mistral-tiny"]["max_position_embeddings"] = 128
    (here / "mine.yaml").write_text(yaml.safe_dump(config))
    (line,) = refused(capfd, "chat-tiny", "--config", "mine.yaml", "--no-step")
    assert "sequences of 256 tokens, chat-tiny has max_position_embeddings 128" in line


# The shape that is foretold


@pytest.mark.parametrize("run", ["chat-tiny", "solo-tiny", "llava-tiny-stage1", "llava-jp-tiny-stage1"])
def test_the_shape_that_is_foretold_is_the_one_that_is_built(run, here):
    """Every folder that the model is made from, by the stages themselves, on the way to it."""
    plan = Plan(load_file(DEFAULT))
    told = Spec.from_config(shape.config_of_run(plan, run))
    made(plan, plan.hf(plan.run(run).model))
    assert inputs.stands(plan, plan.hf(plan.run(run).model))
    assert Spec.from_config(shape.config_of_run(plan, run)) == told


def made(plan, artifact):
    """Run the stages that make a model or a tokenizer."""
    if inputs.stands(plan, artifact):
        return
    parts = [one for several in plan.inputs(artifact).values() for one in several]
    for part in parts:
        made(plan, part)
    command = "tokenizer" if isinstance(artifact, layout.Tokenizer) else "build"
    words = [*map(str, parts), str(artifact), "--settings", plan.settings_text(artifact)]
    assert main([command, *words]) == 0


# The small run


@cache
def default_shape(run):
    """Counting a tokenizer takes seconds."""
    return shape.config_of_run(Plan(load_file(DEFAULT)), run)


def small_of(plan, run, processes=8, gpu=False, **keys):
    job = launched.planned(plan, run)
    model = default_shape(run) if run.endswith("tiny") else shape.config_of_run(plan, run)
    job = replace(job, settings={**job.settings, **keys})
    return Small.of(job, model, processes=processes, length=None, gpu=gpu)


@pytest.mark.parametrize("name", PRESETS)
def test_the_small_form_of_each_preset_has_its_grid_and_its_kind(name, planned):
    plan = planned(name)
    for run in plan.config.runs:
        job, model = launched.planned(plan, run), Spec.from_config(shape.config_of_run(plan, run))
        small = small_of(plan, run)
        spec = Spec.from_config(small.model)
        assert world_size(small.settings) == world_size(job.settings) <= 8
        assert (spec.architecture, spec.vocab_size) == (model.architecture, model.vocab_size)
        ratio = spec.num_attention_heads // spec.num_key_value_heads
        assert ratio == model.num_attention_heads // model.num_key_value_heads
        assert (spec.vision is None) == (model.vision is None)
        engine.rank_shapes(spec, replace(job, settings=small.settings).grid)
        for key in ("optimizer", "params_dtype", "recompute_granularity", "lr", "seed", "freeze"):
            assert small.settings[key] == job.settings[key]


@given(st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 4), st.integers(1, 9), st.booleans())
def test_a_run_of_any_grid_is_made_small_enough(sizes, processes, uneven):
    plan = DEFAULT_PLAN
    keys = dict(zip(AXES, sizes, strict=True))
    keys["micro_batch_size"], keys["global_batch_size"] = 3, 3 * keys["data_parallel_size"] * 5
    keys["sequence_parallel"] = keys["tensor_model_parallel_size"] > 1
    if uneven:
        keys |= {f"num_layers_in_{end}_pipeline_stage": 3 for end in ("first", "last")}
    small = small_of(plan, "chat-tiny", processes, **keys)
    settings = small.settings

    assert world_size(settings) <= processes
    for axis, size in zip(AXES, sizes, strict=True):
        assert settings[axis] in {1, 2, size}
        assert (settings[axis] == size) != any(note.startswith(f"{axis} {size}") for note in small.notes)
    job = replace(launched.planned(plan, "chat-tiny"), settings=settings)
    assert small.sequence % job.pieces == 0
    assert (
        settings["global_batch_size"] % (settings["micro_batch_size"] * settings["data_parallel_size"]) == 0
    )
    assert settings["tensor_model_parallel_size"] > 1 or not settings["sequence_parallel"]
    spec = Spec.from_config(small.model)
    for tp, pp in job.grid:
        engine.rank_shapes(spec, job.grid, tp, pp)


def test_each_key_that_needs_a_gpu_is_named(here):
    plan = Plan(load_file(DEFAULT))
    keys = {"cpu_offloading_num_layers": 2, "optimizer_cpu_offload": True, "params_dtype": "fp16"}
    small = small_of(plan, "chat-tiny", **keys)
    assert {note.split()[0] for note in small.notes} >= set(keys)
    assert small.settings["params_dtype"] == "bf16"
    assert not {note.split()[0] for note in small_of(plan, "chat-tiny", gpu=True, **keys).notes} & set(keys)


# The tiny step


def fly(here, capfd, run, *words, **keys):
    """The whole command; what it said, and that it left nothing behind."""
    mine = config_file(here, run, **keys)
    with TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", temporary)
        code = main(["preflight", run, "--config", mine, *words])
        assert [path.name for path in Path(temporary).glob("plait-*")] == []
    said = capfd.readouterr()
    assert code == 0, said.err
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]
    losses = re.search(r"losses (\S+) and (\S+), the second from the checkpoint of the first", said.out)
    assert all(math.isfinite(float(loss)) and float(loss) > 1 for loss in losses.groups())
    return said.out


def test_a_chat_run_takes_a_real_step(here, capfd):
    said = fly(here, capfd, "chat-tiny", "--processes", "1", lr_warmup_tokens=9999, lr_warmup_iters=0)
    assert "pipeline_model_parallel_size 2 -> 1" in said
    assert "lr_warmup_tokens 9999 -> none" in said


@pytest.mark.long
@pytest.mark.parametrize("run", ["chat-tiny", "solo-tiny", "llava-tiny-stage2", "llava-jp-tiny-stage1"])
def test_every_recipe_takes_a_real_step_on_its_own_grid(run, here, capfd):
    fly(here, capfd, run)


@pytest.mark.long
def test_a_step_has_the_keys_of_its_run(here, capfd):
    keys = {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True,
        "pipeline_model_parallel_size": 1, "data_parallel_size": 4, "params_dtype": "bf16",
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4,
        "global_batch_size": 8, "hidden_dropout": 0.1,
    }  # fmt: skip
    assert "data_parallel_size 4 -> 2" in fly(here, capfd, "chat-tiny", "--processes", "4", **keys)


@pytest.mark.long
def test_experts_are_dealt_out_in_the_step_too(here, capfd):
    config = yaml.safe_load((here / config_file(here)).read_text())
    config["raw_hf"]["Mixtral-tiny"] = {"kind": "init_mixtral", "tokenizer": "mistral-chatml"}
    config["models"]["chat-tiny"] = {"source": "Mixtral-tiny"}
    config["runs"]["chat-tiny"] |= {
        "pipeline_model_parallel_size": 1, "data_parallel_size": 2, "expert_model_parallel_size": 2,
    }  # fmt: skip
    (here / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["preflight", "chat-tiny", "--config", "mine.yaml"]) == 0
    said = capfd.readouterr().out
    assert "ranks           2 of a 1 x 1 grid" in said
    assert "the second from the checkpoint of the first" in said


@pytest.mark.long
def test_a_step_that_fails_is_one_sentence(here, capfd):
    words = ("chat-tiny", "--config", config_file(here, lr_decay_iters=3, lr_warmup_iters=5))
    (line,) = refused(capfd, *words, "--processes", "1")
    assert line.startswith("error: the tiny step failed")


@pytest.mark.parametrize(
    "row", [{"lm loss": math.nan, "grad norm": 1.0}, {"lm loss": 1.0, "grad norm": math.inf}]
)
def test_a_loss_that_is_no_number_is_refused(here, monkeypatch, row):
    plan = Plan(load_file(DEFAULT))

    def train(job, root):
        (root / job.run.metrics).write_text(to_line(row) + "\n")

    monkeypatch.setattr(step, "_train", train)
    with pytest.raises(CheckpointError, match="the tiny step has lm loss"):
        step.tiny_step(plan, launched.planned(plan, "chat-tiny"), small_of(plan, "chat-tiny"))


def test_packs_that_stand_are_what_is_stepped_on(here, monkeypatch):
    import numpy as np

    from plait.preflight import project
    from plait.tokens import roles
    from plait.tokens.indexed import Pack, PackedShard

    plan = Plan(load_file(DEFAULT))
    real = here / str(layout.Indexed(format="chatml", dataset="dialogues", seq=256, shard=0))
    real.mkdir(parents=True)
    draw = np.random.default_rng(1)
    role = np.full(200, roles.USER)
    role[150:] = roles.ASSISTANT
    packs = [Pack(draw.integers(3, 32000, 200), role, np.full(200, -1), [], None) for _ in range(3)]
    project._write_packs(real, packs, vocabulary=32002, vision=False)
    files.write_manifest(
        real,
        kind="indexed",
        settings=plan.settings(layout.Indexed.parse(real)),
        facts={"eos_id": 2, "vision": {}},
    )
    job, told = project.write(
        here / "small", small_of(plan, "chat-tiny"), plan, launched.planned(plan, "chat-tiny")
    )
    shard = PackedShard(
        here / "small" / str(layout.Indexed(format="small", dataset="small", seq=64, shard=0))
    )

    assert told.startswith("the first packs of data/megatron_format/chatml_dialogues_pack256/shard_00000")
    assert len(shard) == 3
    for pack, whole in zip(shard, packs, strict=True):
        assert pack.text.tolist() == whole.text[118:182].tolist()
        assert pack.role.tolist().count(roles.ASSISTANT) == 32
    assert job.start == "data/models/sharded/small-megatron-tp1-pp2"
