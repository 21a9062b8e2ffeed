"""Runs over two nodes of a real Slurm: left alone, killed, out of time, and asked for twice."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest

CONFIG = Path(__file__).parent / "config.yaml"
LONG = "data/ckpts/long/iter_0000120/plait.json"
GROUPED = ("tokenizer", "model", "convert", "verify_megatron", "shard", "verify_sharded")


@pytest.fixture(scope="module")
def made(project_on_slurm, tmp_path_factory):
    """X by the README's command, Y beside it with its small jobs in one; both as their drivers left them."""
    chat, solo = (project_on_slurm(tmp_path_factory.mktemp(run) / "project", CONFIG) for run in "XY")
    groups = [f"{rule}=models" for rule in GROUPED]
    drivers = {
        "X": (chat, chat.start("ckpts/X/hf/model_iter_100")),
        "Y": (solo, solo.start("ckpts/Y/hf/model_iter_20", "--groups", *groups)),
    }
    for _, driver in drivers.values():
        driver.wait(1800)
    return drivers


@pytest.mark.parametrize(("run", "step", "gpus"), [("X", 100, 1), ("Y", 20, 2)])
def test_a_target_is_made_from_nothing_by_jobs_on_two_nodes(run, step, gpus, made, cluster):
    project, driver = made[run]
    assert driver.returncode == 0, project.said

    export = project.folder / f"ckpts/{run}/hf/model_iter_{step}"
    assert json.loads((export / "plait.json").read_text())["facts"]["merkle"]
    assert (project.folder / f"data/verify/ckpts/{run}/hf/model_iter_{step}/parity.json").is_file()
    logs = list((project.folder / "data/logs/slurm/rule_train").glob(f"{run}_*/*.log"))
    jobs = [cluster.show(log.stem) for log in logs]
    assert len(jobs) == 2
    assert {(job["NodeList"], job["NumNodes"], job["NumTasks"]) for job in jobs} == {("n[1-2]", "2", "2")}
    assert {job["TresPerNode"] for job in jobs} == {f"gres:gpu:{gpus}"}


def test_a_models_way_to_its_shards_is_one_job_where_it_is_grouped(made, cluster):
    project, _ = made["Y"]

    (log,) = project.folder.glob("data/logs/slurm/group_*/*.log")

    assert cluster.show(log.stem)["JobState"] == "COMPLETED"
    for rule in GROUPED:
        assert not list(project.folder.glob(f"data/logs/slurm/rule_{rule}/**/*.log")), rule


@pytest.fixture(scope="module")
def reference(made):
    """The run `long` without Slurm and without a break: its rows and its manifest."""
    project, driver = made["X"]
    assert driver.returncode == 0, project.said
    project.run(LONG)
    return Long(project.folder)


class Long:
    """The run `long` of a project."""

    def __init__(self, folder):
        self.folder = folder / "data/ckpts/long"
        self.log = folder / "data/logs/train/long/iter_0000120.log"
        self.benchmark = folder / "data/benchmarks/train/long/iter_0000120.tsv"

    @property
    def seconds(self):
        """How long `plait train` took from its first word to its last."""
        names, values, *_ = (line.split("\t") for line in self.benchmark.read_text().splitlines())
        return float(values[names.index("s")])

    @property
    def rows(self):
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def done(self):
        """The iteration that it has come to."""
        return max((row["iteration"] for row in self.rows), default=0)

    @property
    def writer(self):
        """The process and the job that write it now, as its lease has them."""
        path = self.folder / ".lease"
        lease = json.loads(path.read_text()) if path.is_file() else {"pid": 0, "job": ""}
        return lease["pid"], lease["job"]

    def equals(self, other):
        """No iteration is lost or doubled, and every file of the checkpoint has the same bytes."""
        assert [row["iteration"] for row in self.rows] == list(range(1, 121))
        assert [row["lm loss"] for row in self.rows] == [row["lm loss"] for row in other.rows]
        mine, others = (one.folder / "iter_0000120/plait.json" for one in (self, other))
        assert mine.read_text() == others.read_text()
        return True


@pytest.fixture
def before(made, reference, tmp_path):
    """A project in which nothing of the run `long` is there but its schedule."""
    copy = made["X"][0].copy(tmp_path / "project")
    long = Long(copy.folder)
    for path in long.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "schedule.json":
            path.unlink()
    return copy, long


def test_a_killed_run_goes_on_tried_again_or_asked_again(before, reference, cluster):
    project, long = before
    driver = project.start(LONG, "--retries", "1")

    cluster.wait(lambda: long.done > 30)
    process, first = long.writer
    os.kill(process, signal.SIGKILL)
    cluster.wait(lambda: long.done > 50 and long.writer[1] not in {"", first})
    second = long.writer[1]
    cluster.cancel(second)
    assert driver.wait(300) == 1
    assert cluster.show(first)["JobState"] == "FAILED"
    assert cluster.show(second)["JobState"] == "CANCELLED"
    assert f"data/logs/slurm/rule_train/long_0000120/{second}.log" in project.said
    kept = long.done
    asked_again = project.submit(LONG)

    assert asked_again.code == 0, asked_again.text
    assert kept < 120
    assert "training goes on from it" in long.log.read_text()
    assert long.equals(reference)


@pytest.mark.long
def test_a_run_out_of_time_is_requeued_and_loses_no_iteration(before, reference, cluster):
    project, long = before
    training = sum(row["iteration-time"] for row in reference.rows)
    turn = reference.seconds - training + 5 + training / 4  # a start, Snakemake's own, a quarter of the work
    minutes = math.ceil((turn + 5) / 60)
    config = {
        "runs": {"long": {"requeue_before": round(60 * minutes - turn)}},
        "jobs": {"rules": {"train": {"runtime": minutes}}},
    }

    done = project.submit(LONG, "--retries", "0", config=config)

    assert done.code == 0, done.text
    (log,) = (project.folder / "data/logs/slurm/rule_train/long_0000120").glob("*.log")
    job = cluster.show(log.stem)
    assert job["TimeLimit"] == f"00:{minutes:02d}:00"
    assert int(job["Restarts"]) >= 2
    assert [one["JobState"] for one in cluster.ended() if one["JobId"] == log.stem][-1] == "COMPLETED"
    assert long.equals(reference)


@pytest.mark.long
def test_a_driver_that_was_killed_leaves_its_job_and_no_other_writes(before, reference, cluster):
    project, long = before
    driver = project.start(LONG)
    cluster.wait(lambda: long.done > 5)
    writer = long.writer
    os.kill(writer[0], signal.SIGSTOP)  # the job lives for as long as the test looks at it
    driver.kill()
    driver.wait()

    locked = project.submit(LONG)
    project.submit("--unlock", LONG)
    refused = project.submit(LONG, "--retries", "0")
    assert cluster.show(writer[1])["JobState"] == "RUNNING"
    assert long.writer == writer
    os.kill(writer[0], signal.SIGCONT)
    cluster.wait(lambda: cluster.show(writer[1])["JobState"] == "COMPLETED")
    last = project.submit(LONG)

    assert "cannot be locked" in locked.text
    assert refused.code == 1
    assert "another job is training in data/ckpts/long" in refused.text
    assert last.nothing, last.text
    assert long.equals(reference)
