"""What the launcher starts once a machine: ``python -m plait.train.node JOB``. It becomes torchrun.

On several nodes it finds its place from what ``srun`` sets: node 0 picks a port and says in a file of the
run's folder where the ranks meet, the others read it.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from plait import files
from plait.config.run import processes_per_node
from plait.errors import CheckpointError, PlaitError
from plait.train import signals, slurm
from plait.train.job import Job

PATIENCE = 600.0
"""Seconds to wait for node 0; shared file systems and images are slow to show up."""
DETERMINISTIC = {
    "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}  # fmt: skip
"""What GPUs need to add in one order, as Megatron-LM asks for it."""
ALONE = ("--standalone",)
"""The place of a machine that shares a run with no other."""
ADDRESSES = "PLAIT_NODE_ADDRESSES"
"""What the launcher knows of Slurm's nodes: addresses by name, as JSON."""


def torchrun(job: Job, processes: int, place: tuple[str, ...]) -> list[str]:
    """The command that this process becomes: one process a rank on this machine.

    Torchrun leaves the signals that ask to stop to the ranks: it would give them 30 seconds.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *place,
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT",
        f"--nproc-per-node={processes}",
        "-m",
        "plait.train.worker",
        job.to_json(),
    ]


def place_in_step(run: Path) -> tuple[str, ...]:
    """This node's place among those of its ``srun`` step, and where all meet.

    Raises:
        CheckpointError: node 0 does not say where.
    """
    rank, nodes = int(os.environ["SLURM_NODEID"]), os.environ["SLURM_NNODES"]
    step = f"{slurm.own_job()}-{os.environ['SLURM_STEP_ID']}"
    path = run / f".rendezvous-{step}.json"
    if rank == 0:
        found = {"host": os.environ["SLURMD_NODENAME"], "port": str(free_port())}
        files.write_json(path, found)
    else:
        found = _wait_for(path)
    return place(rank, nodes, host=_reachable(found["host"]), port=found["port"])


def place(rank: int, nodes: int | str, *, host: str, port: str) -> tuple[str, ...]:
    """Where a node stands among all, and where they meet, as torchrun reads it."""
    return (f"--nnodes={nodes}", f"--node-rank={rank}", f"--master-addr={host}", f"--master-port={port}")


def free_port() -> int:
    """A port that nobody uses now; two runs on one node get two."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait_for(path: Path) -> dict[str, str]:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        os.listdir(path.parent)  # noqa: PTH208 - NFS looks anew into a folder that is listed
        if path.is_file():
            found: dict[str, str] = files.read_json(path)
            return found
        time.sleep(0.5)
    raise CheckpointError(
        f"node 0 has not written {path} for {PATIENCE:.0f} s",
        hint="is data/ on a file system that all nodes share?",
    )


def _reachable(host: str) -> str:
    """A name that resolves here, or the address that Slurm has of the node; an image cannot ask it."""
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        return str(json.loads(os.environ.get(ADDRESSES, "{}")).get(host, host))
    return host


def environment(job: Job, processes: int) -> dict[str, str]:
    """What as many ranks of a job find on their machine."""
    return {**os.environ, **added(job, processes)}


def added(job: Job, processes: int) -> dict[str, str]:
    """What they find besides what is there; each has its share of the cores.

    Snakemake gives a job as many threads as it has cores; every rank would take them all.
    """
    threads = str(max(1, _cores() // processes))
    found = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    found |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    if job.settings["deterministic_mode"]:
        found |= DETERMINISTIC
    return {**found, **named(job)}


def shares(processes: int, environ: Mapping[str, str]) -> str:
    """How the ranks of this machine share its cores, in a line."""
    own = "1 process has" if processes == 1 else f"{processes} processes have"
    threads = environ["OMP_NUM_THREADS"]
    return f"{own} OMP_NUM_THREADS {threads} each, of {_cores()} cores of {socket.gethostname()}"


def named(job: Job) -> dict[str, str]:
    """What the run's keys say of devices and networks; they go before what the environment says."""
    found = {}
    if job.around["gpu_ids"]:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, job.around["gpu_ids"]))
    if job.around["network_interface"]:
        found |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), job.around["network_interface"])
    return found


def _cores() -> int:
    """Those that this process may use; not every Slurm confines a job to its own."""
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    own = len(os.sched_getaffinity(0))
    return min(own, int(given)) if given.isdecimal() else own


def main() -> NoReturn:
    """Become torchrun, deaf to the signals that the ranks hear."""
    signals.ignore()
    job = Job(**json.loads(sys.argv[1]))
    try:
        in_step = job.around["launch"] == "slurm"
        where = place_in_step(Path(str(job.run))) if in_step else ALONE
    except PlaitError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    processes = processes_per_node(job.settings, job.machines)
    command, environ = torchrun(job, processes, where), environment(job, processes)
    print(shares(processes, environ), file=sys.stderr, flush=True)  # noqa: T201
    os.execve(command[0], command, environ)  # noqa: S606


if __name__ == "__main__":
    main()
