"""The torchrun command of a training job."""

import os
import subprocess
import sys

from plait.config.run import world_size
from plait.errors import CheckpointError
from plait.train.job import Job


def command(job: Job) -> list[str]:
    """One process a rank of the grid on this machine, with a rendezvous of its own."""
    processes = world_size(job.settings)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={processes}", "-m", "plait.train.worker", job.to_json()]


def environment(processes: int) -> dict[str, str]:
    """The ranks share the cores: as many threads each as there are cores to share.

    Snakemake gives a job as many threads as it has cores; every rank would take them all.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    shared = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return {**os.environ, **shared, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}


def launch(job: Job) -> None:
    """Run the job's processes to their end.

    Raises:
        CheckpointError: one of them failed; what it said is above.
    """
    processes = world_size(job.settings)
    ended = subprocess.run(command(job), env=environment(processes), check=False)
    if ended.returncode:
        raise CheckpointError(
            f"training {job.target} ended with status {ended.returncode}; what its ranks said is above",
            hint="asking for the same target again goes on from the last whole checkpoint",
        )
