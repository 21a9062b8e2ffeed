"""What a training job refuses before it starts a process."""

import json
from pathlib import Path

import pytest
import yaml

from plait import files
from plait.errors import CheckpointError, ConfigError, DataError
from plait.train.job import Job, lock
from plait.train.launch import command, environment

SETTINGS = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
START = "data/models/sharded/m-megatron-tp2-pp1"
SHARD = "data/megatron_format/f_d_pack64/shard_00000"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Inputs that fit, made by hand; a change of one is a test."""
    monkeypatch.chdir(tmp_path)

    def make(
        *,
        model=None,
        facts=None,
        grid=None,
        target="data/ckpts/r/iter_0000050",
        train_iters=100,
        name="m",
    ):
        for folder, kind, known in (
            (START, "sharded", {"grid": grid or {"tp": 2, "pp": 1}, "tokenizer": "a" * 64}),
            (SHARD, "indexed", {"vocab_size": 300, "tokenizer": "a" * 64, **(facts or {})}),
        ):
            Path(folder).mkdir(parents=True)
            files.write_manifest(Path(folder), kind=kind, settings={}, facts=known)
        config = {"vocab_size": 300, "max_position_embeddings": 128, "sliding_window": None, **(model or {})}
        Path(START, "hf_config.json").write_text(json.dumps(config))
        Path("data/analysis/x").mkdir(parents=True)
        mixture = {"sources": [{"prefix": SHARD, "weight": 1.0}]}
        Path("data/analysis/x/mixture.yaml").write_text(yaml.safe_dump(mixture))
        files.write_json("data/ckpts/r/schedule.json", {"train_iters": train_iters, "save_interval": 50})
        settings = {**SETTINGS, "model": name}
        return Job(START, "data/analysis/x", "data/ckpts/r/schedule.json", target, settings)

    return make


def test_inputs_that_fit_are_accepted(job):
    job().check()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"train_iters": 40}, ConfigError, "iteration 50 of run r is never saved"),
        ({"target": "data/ckpts/r/iter_0000060"}, ConfigError, "iteration 60 of run r is never saved"),
        ({"target": "data/ckpts/r/iter_0000100"}, ConfigError, "is trained from data/ckpts/r/iter_0000050"),
        ({"name": "other"}, ConfigError, "is trained from the sharded model other"),
        ({"grid": {"tp": 1, "pp": 2}}, CheckpointError, "is cut for tp1 x pp2, the run wants tp2 x pp1"),
        ({"facts": {"tokenizer": "b" * 64}}, DataError, "was made by tokenizer bbbb"),
        ({"model": {"max_position_embeddings": 32}}, DataError, "max_position_embeddings 32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(job, change, error, sentence):
    with pytest.raises(error, match=sentence):
        job(**change).check()


def test_two_jobs_never_write_one_run(tmp_path):
    run = tmp_path / "run"
    with lock(run), pytest.raises(CheckpointError, match="another job is training"), lock(run):
        pass
    with lock(run):
        pass


def test_torchrun_starts_a_process_a_rank_and_shares_the_cores(job, monkeypatch):
    made = job()
    assert "--nproc-per-node=2" in command(made)
    assert Job(**json.loads(command(made)[-1])) == made
    monkeypatch.setenv("OMP_NUM_THREADS", "64")  # Snakemake's, for the whole job
    assert environment(1_000)["OMP_NUM_THREADS"] == environment(1_000)["MKL_NUM_THREADS"] == "1"
