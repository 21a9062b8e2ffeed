"""Whole plans on a real Slurm: runs over two nodes, killed, requeued, and asked for twice."""

import json
from pathlib import Path

import pytest

CONFIG = Path(__file__).parent / "config.yaml"
GROUPED = ("tokenizer", "model", "convert", "verify_megatron", "shard", "verify_sharded")


@pytest.fixture(scope="module")
def made(project_on_slurm, tmp_path_factory):
    """X by the README's command, Y beside it with its small jobs in one; and how both ended."""
    chat, solo = (project_on_slurm(tmp_path_factory.mktemp(run) / "project", CONFIG) for run in "XY")
    groups = [f"{rule}=models" for rule in GROUPED]
    with solo.driver("ckpts/Y/hf/model_iter_20", "--groups", *groups) as driver:
        done = chat.snakemake("--profile", "slurm", "ckpts/X/hf/model_iter_100", timeout=900)
        driver.wait(600)
    return {"X": (chat, done.code, done.text), "Y": (solo, driver.returncode, solo.said)}


@pytest.mark.parametrize(("run", "step"), [("X", 100), ("Y", 20)])
def test_a_target_is_made_from_nothing_by_jobs_on_two_nodes(run, step, made, cluster):
    project, code, said = made[run]
    assert code == 0, said

    export = project.folder / f"ckpts/{run}/hf/model_iter_{step}"
    assert json.loads((export / "plait.json").read_text())["facts"]["merkle"]
    assert (project.folder / f"data/verify/ckpts/{run}/hf/model_iter_{step}/parity.json").is_file()
    logs = list((project.folder / "data/logs/slurm/rule_train").glob(f"{run}_*/*.log"))
    jobs = [cluster.show(log.stem) for log in logs]
    assert len(jobs) == 2
    assert {(job["NodeList"], job["NumNodes"], job["NumTasks"]) for job in jobs} == {("n[1-2]", "2", "2")}
    assert {job["TresPerNode"] for job in jobs} == {"gres:gpu:1"}
