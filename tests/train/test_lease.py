"""Two jobs never write one run: leases of living, dead, foreign and fighting processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.errors import CheckpointError
from plait.train import lease
from plait.train.lease import NAME, Lease, hold, read, refuse_live

HOLD = """
import sys
from pathlib import Path
from plait.train.lease import hold
print("ready", flush=True)
sys.stdin.readline()
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def taker(run):
    """Another process that is about to take the run; a line on stdin lets it, another lets it go."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, run], text=True, bufsize=1, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def holder(run):
    """Another process that holds the run."""
    process = taker(run)
    process.stdin.write("\n")
    assert process.stdout.readline() == "held\n"
    return process


def left(run):
    return [path.name for path in run.iterdir()]


def foreign(run, *, job="", age=0.0, host="far.example", **keys):
    """The lease of a process on another machine."""
    run.mkdir(exist_ok=True)
    beat = time.time() - age
    values = {"host": host, "pid": 42, "started": "b-1", "job": job, "beat": beat, **keys}
    (run / NAME).write_text(Lease(**values).to_json())
    os.utime(run / NAME, (beat, beat))


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A Slurm that says this and nothing else."""

    def say(text="", *, error="", status=0):
        program = tmp_path / "bin/squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\nprintf '{text}'\necho '{error}' >&2\nexit {status}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    return say


def test_a_run_is_held_by_one_process_and_is_free_afterwards(tmp_path):
    with hold(tmp_path / "run"):
        assert read(tmp_path / "run").pid == os.getpid()
        with pytest.raises(
            CheckpointError, match=f"another job is training.*process {os.getpid()} on .* runs"
        ):
            hold(tmp_path / "run").__enter__()
    assert left(tmp_path / "run") == []
    with hold(tmp_path / "run"):
        pass


def test_a_live_holder_is_left_alone_and_a_killed_one_is_replaced(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(CheckpointError, match=f"process {process.pid} .* runs"):
        refuse_live(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read(tmp_path).state() == "stale"
    assert read(tmp_path).why.endswith("is gone")
    refuse_live(tmp_path)
    with hold(tmp_path):
        assert read(tmp_path).pid == os.getpid()
    assert left(tmp_path) == []


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    foreign(tmp_path, host=socket.gethostname(), pid=os.getpid())
    assert read(tmp_path).state() == "stale"


def test_of_many_takers_at_one_time_one_gets_it(tmp_path):
    run = tmp_path / "run"
    for _ in range(5):
        foreign(run, age=10_000)
        takers = [taker(run) for _ in range(4)]
        for one in takers:
            one.stdin.write("\n")
        winner = next(one for one in takers if one.stdout.readline() == "held\n")
        losers = [one for one in takers if one is not winner]
        assert all("another job is training" in one.communicate()[1] for one in losers)
        assert read(run).pid == winner.pid
        winner.communicate("\n")
        assert left(run) == []


@pytest.mark.parametrize(
    ("answer", "state", "why"),
    [
        ({"text": "RUNNING|100|9999999999\n"}, "live", "Slurm has the job as RUNNING"),
        ({"text": "PENDING|N/A|N/A\n"}, "stale", "Slurm has the job as PENDING"),
        ({"text": ""}, "stale", "Slurm has the job no longer"),
        ({"error": "slurm_load_jobs error: Invalid job id specified", "status": 1}, "stale", "no longer"),
        ({"text": "RUNNING|9999999998|9999999999\n"}, "stale", "begun the job anew since its last beat"),
        ({"error": "Unable to contact slurm controller", "status": 1}, "live", "last heard of"),
    ],
)
def test_the_lease_of_a_slurm_job_is_as_slurm_says(tmp_path, squeue, answer, state, why):
    squeue(**answer)
    foreign(tmp_path / "run", job="77")
    found = read(tmp_path / "run")
    assert found.state() == state
    assert why in found.why
    assert "-j 77" in (tmp_path / "asked").read_text()


def test_a_dead_jobs_lease_is_moved_away_before_who_cannot_ask_slurm_starts(tmp_path, squeue, monkeypatch):
    run = tmp_path / "run"
    squeue(error="slurm_load_jobs error: Invalid job id specified", status=1)
    foreign(run, job="77")
    lease.clear(run)
    monkeypatch.setenv("PATH", "/nowhere")  # in an image
    with hold(run):
        pass
    assert left(run) == []

    foreign(run, job="78")
    with pytest.raises(CheckpointError, match="another job is training"):
        lease.clear(run)
    assert read(run).job == "78"


def test_slurm_is_believed_more_than_a_fresh_or_a_late_beat(tmp_path, squeue):
    squeue("RUNNING|100|200\n")
    foreign(tmp_path / "run", job="77", age=10_000)
    assert read(tmp_path / "run").state() == "live"


@pytest.mark.parametrize(
    ("age", "state"), [(0, "live"), (lease.SILENCE - 30, "live"), (lease.SILENCE + 30, "stale")]
)
def test_who_cannot_be_asked_for_is_dead_after_ten_silent_minutes(tmp_path, age, state):
    foreign(tmp_path, age=age)
    assert read(tmp_path).state() == state
    assert "process 42 on far.example was last heard of" in read(tmp_path).why


def test_a_holder_beats_and_its_file_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    with hold(tmp_path):
        first = read(tmp_path).beat
        time.sleep(0.3)
        for _ in range(200):
            json.loads((tmp_path / NAME).read_text())
        assert read(tmp_path).beat > first


def test_who_lost_its_lease_publishes_nothing_and_leaves_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    with hold(tmp_path) as held:
        held.check()
        (tmp_path / NAME).rename(tmp_path / "taken")  # as who took it for dead does
        foreign(tmp_path)
        with pytest.raises(CheckpointError, match="not of this process any more: process 42 on far"):
            held.check()
        time.sleep(0.2)
    assert read(tmp_path).pid == 42


def test_what_is_no_lease_is_a_sentence(tmp_path):
    Path(tmp_path, NAME).write_text("{")
    with pytest.raises(CheckpointError, match="is no lease"):
        refuse_live(tmp_path)
