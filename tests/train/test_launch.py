"""How a job's processes are started, and when it is told to stop: commands as text, one run for real."""

import json
import os
import signal
import sys
import time

import pytest
from jobs import STEPS, packed

from plait.config.run import Around
from plait.errors import ConfigError
from plait.train import launch, node, slurm
from plait.train.job import Job

AXES = ("tensor_model", "pipeline_model", "context", "data")


def job(world=(1, 2, 1, 2), **around):
    sizes = {f"{axis}_parallel_size": size for axis, size in zip(AXES, world, strict=True)}
    sizes |= {"deterministic_mode": True}
    return Job("s", "a", "c", "data/ckpts/r/iter_0000050", sizes, Around(**around).model_dump(mode="json"))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of Slurm that do what is said here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def make(**scripts):
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return make


def test_alone_a_machine_starts_one_process_that_becomes_torchrun(monkeypatch):
    made = launch.chosen(job())
    assert launch.command(made)[:3] == [sys.executable, "-m", "plait.train.node"]
    assert Job(**json.loads(launch.command(made)[3])) == made
    torchrun = node.torchrun(made, 4, ("--standalone",))
    assert torchrun[3:6] == [
        "--standalone",
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT",
        "--nproc-per-node=4",
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "64")  # Snakemake's, for the whole job
    shared = node.environment(made, 1_000)
    assert shared["OMP_NUM_THREADS"] == shared["MKL_NUM_THREADS"] == "1"
    cores = len(os.sched_getaffinity(0))
    assert node.environment(made, 1)["OMP_NUM_THREADS"] == str(cores)
    assert node.shares(1_000, shared).startswith(f"1000 processes have OMP_NUM_THREADS 1 each, of {cores} ")
    assert "CUDA_VISIBLE_DEVICES" not in shared or shared["CUDA_VISIBLE_DEVICES"] == os.environ.get(
        "CUDA_VISIBLE_DEVICES"
    )


def test_gpus_and_the_network_are_chosen_by_environment():
    found = node.environment(job(gpu_ids=[3, 5], network_interface="ib0"), 2)
    assert found["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ib0"


def test_on_several_nodes_srun_starts_one_process_on_each(programs, monkeypatch):
    programs(scontrol="printf 'a\\nb\\n'")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "[a-b]")
    made = launch.chosen(job(nodes=2))
    assert made.around["launch"] == "slurm"
    command = launch.command(made)
    assert " ".join(command[:-1]) == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none --overlap --kill-on-bad-exit=1 "
        f"{sys.executable} -m plait.train.node"
    )
    assert "--nproc-per-node=2" in node.torchrun(made, 4 // made.machines, ())


def test_an_image_stands_behind_srun_and_its_tokens_not_in_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-1")
    monkeypatch.setenv("HF_TOKEN", "secret-2")
    monkeypatch.chdir(tmp_path)
    command = launch.command(job(launch="slurm", nodes=2), "x.sif")
    words = " ".join(command)
    assert words.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 ")
    assert f" apptainer exec --pwd {tmp_path} x.sif python -m plait.train.node " in words
    assert "secret" not in words
    assert launch.command(job(launch="local"), "x.sif")[:2] == ["apptainer", "exec"]


@pytest.mark.parametrize(
    ("around", "variables", "sentence"),
    [
        ({"launch": "slurm"}, {}, "SLURM_JOB_ID is not set"),
        ({"launch": "slurm", "nodes": 4}, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "[a-b]"},
         "spread over nodes 4, Slurm job 7 has 2: a b"),
        ({"launch": "env"}, {}, "WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"launch": "env"}, {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
         "3, the run has 4 processes: tensor_model_parallel_size 1 x pipeline_model_parallel_size 2 x "),
        ({"launch": "env"}, {"WORLD_SIZE": "4", "RANK": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
         "RANK is 4; expected 0 to 3"),
        ({"launch": "env"}, {"WORLD_SIZE": "4", "RANK": "x", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
         "RANK is 'x'; expected a number"),
    ],
)  # fmt: skip
def test_a_way_to_start_that_lacks_something_is_a_sentence(
    around, variables, sentence, programs, monkeypatch
):
    programs(scontrol="printf 'a\\nb\\n'")
    for name in (*launch.ENV, "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        launch.chosen(job(**around))


def test_one_node_of_an_allocation_needs_no_srun(programs, monkeypatch):
    programs(scontrol="printf 'a\\n'")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a")
    assert launch.chosen(job(nodes=2)).around["launch"] == "local"


def test_the_launcher_asks_slurm_for_addresses_that_an_image_cannot(programs, monkeypatch):
    shown = (
        "NodeName=a Arch=x86_64 \\n   NodeAddr=10.0.0.1 NodeHostName=x\\n\\nNodeName=b NodeAddr=10.0.0.2\\n"
    )
    programs(scontrol=f"case $2 in hostnames) printf 'a\\nb\\n';; *) printf '{shown}';; esac")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "[a-b]")

    assert slurm.addresses() == {"a": "10.0.0.1", "b": "10.0.0.2"}


def test_gpus_of_a_deterministic_run_add_in_one_order():
    made = job()
    assert node.environment(made, 1)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    made.settings["deterministic_mode"] = False
    assert "NCCL_ALGO" not in node.environment(made, 1)


def test_what_a_run_names_goes_before_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert node.environment(job(), 1)["CUDA_VISIBLE_DEVICES"] == "0"
    found = node.named(job(gpu_ids=[2, 3], network_interface="ib0"))
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ib0"
    assert found.items() <= node.environment(job(gpu_ids=[2, 3], network_interface="ib0"), 1).items()


def test_nodes_meet_where_node_0_says(tmp_path, programs, monkeypatch):
    common = {
        node.ADDRESSES: json.dumps({"no-such-host": "127.0.0.1"}),
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "3",
        "SLURM_NNODES": "2",
        "SLURMD_NODENAME": "no-such-host",
    }
    for name, value in common.items():
        monkeypatch.setenv(name, value)
    places = []
    for rank in "01":
        monkeypatch.setenv("SLURM_NODEID", rank)
        places.append(node.place_in_step(tmp_path))
    found = json.loads((tmp_path / ".rendezvous-7-3.json").read_text())
    ends = ("--master-addr=127.0.0.1", f"--master-port={found['port']}")
    assert places == [("--nnodes=2", f"--node-rank={rank}", *ends) for rank in "01"]
    assert len({node.free_port() for _ in range(3)}) > 1


def clock(programs, monkeypatch, *, began, ends, before=100):
    now = time.time()
    text = f"RUNNING|{now + began:.0f}|{ends if isinstance(ends, str) else f'{now + ends:.0f}'}"
    programs(squeue=f"echo '{text}'")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return launch.Clock.of(job(requeue_before=before))


def test_the_clock_of_a_slurm_job_strikes_before_its_end(programs, monkeypatch):
    assert not clock(programs, monkeypatch, began=-900, ends=200).is_over()
    assert clock(programs, monkeypatch, began=-900, ends=99).is_over()
    for endless in ("N/A", "NONE"):
        assert not clock(programs, monkeypatch, began=-900, ends=endless).is_over()
    prolonged = clock(programs, monkeypatch, began=-900, ends=99)
    clock(programs, monkeypatch, began=-900, ends=5_000)
    assert not prolonged.is_over()
    with pytest.raises(ConfigError, match="lasts 90 s in all, and the run's requeue_before is 100"):
        clock(programs, monkeypatch, began=0, ends=90)


def test_outside_of_slurm_there_is_no_clock(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not launch.Clock.of(job()).is_over()
    assert slurm.nodes_of_job() == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("place"), pipeline_model_parallel_size=2)


def test_ranks_that_somebody_else_starts_train_together(place, tmp_path):
    place = place.copy(tmp_path)
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(node.free_port())}
    ranks = [place.begin(env={**meet, "RANK": str(rank)}, launch="env") for rank in range(2)]
    said = [rank.communicate(timeout=250)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert all("2 processes have OMP_NUM_THREADS" in one for one in said)
    assert place.result()[1][-1]["iteration"] == STEPS
    assert not list(place.ckpts.glob(".*"))


LOOKS_OFTEN = """
import sys
from plait.cli.main import main
from plait.train import launch
launch.LOOK = 0.5
sys.exit(main(sys.argv[1:]))
"""


def test_before_the_end_of_its_slurm_job_a_run_is_saved_and_queued_again(place, tmp_path, programs):
    place = place.copy(tmp_path / "project")
    soon = f"[ $(cat {place.ckpts}/metrics.jsonl | wc -l) -ge 5 ] && end=$(($(date +%s) + 10))"
    programs(
        squeue=f'end=9999999999\n{soon}\necho "RUNNING|1000|$end"',
        scontrol=f'echo "$@" >> {tmp_path}/asked; kill -TERM $PPID',  # as Slurm ends the job
    )
    said = place.begin(
        env={"SLURM_JOB_ID": "7"}, start=("-c", LOOKS_OFTEN), launch="local", requeue_before=20
    )
    out, _ = said.communicate(timeout=250)
    assert said.returncode == -signal.SIGTERM, out
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert "ends soon: the run is saved and queued again" in out
    assert place.states == [f"iter_{len(place.rows()):07d}"]
    assert 5 <= len(place.rows()) < STEPS
