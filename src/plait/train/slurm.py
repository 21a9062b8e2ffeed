"""What a job asks Slurm: of itself and of others. Where there is no Slurm, nothing is known."""

import os
import re
import subprocess
from dataclasses import dataclass

NODE = re.compile(r"NodeName=(\S+).*?\bNodeAddr=(\S+)", re.DOTALL)
PATIENCE = 30.0
"""Seconds that a question may take; a busy controller answers late."""
RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
"""States in which processes of a job may be alive."""


@dataclass(frozen=True)
class JobLife:
    """A job as Slurm sees it now.

    Attributes:
        state: Slurm's word for it; "" for a job that it does not know, or no longer has in its queue.
        began: when this life of the job began, in seconds of the epoch; a requeued job begins anew.
        ends: when its time is over.
    """

    state: str
    began: float | None = None
    ends: float | None = None

    @property
    def runs(self) -> bool:
        """Whether processes of it may be alive."""
        return self.state in RUNNING


def own_job() -> str:
    """The job that this process belongs to; "" outside of Slurm."""
    return os.environ.get("SLURM_JOB_ID", "")


def ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run a command of Slurm; None where there is none, or it does not answer. Times are in seconds."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
        )
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return None


def life(job: str) -> JobLife | None:
    """How a job is; None where nobody can say."""
    answer = ask("squeue", "-h", "-j", job, "-o", "%T|%S|%e")
    if answer is None:
        return None
    if answer.returncode:
        return JobLife("") if "Invalid job id" in answer.stderr else None
    lines = answer.stdout.split()
    if not lines:
        return JobLife("")
    state, began, ends = (*lines[0].split("|"), "", "")[:3]
    return JobLife(state, _seconds(began), _seconds(ends))


def _seconds(text: str) -> float | None:
    return float(text) if text.isdecimal() else None


def nodes_of_job() -> list[str]:
    """The names of the nodes of this job; empty outside of Slurm.

    Snakemake's job step takes the list of nodes out of the environment and leaves the job's number.
    """
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if own_job() and not names:
        known = ask("squeue", "-h", "-j", own_job(), "-o", "%N")
        names = known.stdout.strip() if known and not known.returncode else ""
    answer = ask("scontrol", "show", "hostnames", names) if names else None
    return answer.stdout.split() if answer and not answer.returncode else []


def addresses() -> dict[str, str]:
    """The addresses that Slurm has of this job's nodes, for names that no resolver knows."""
    names = nodes_of_job()
    answer = ask("scontrol", "show", "node", ",".join(names)) if names else None
    return dict(NODE.findall(answer.stdout)) if answer else {}


def requeue(job: str) -> str:
    """Put a job back into the queue; "" if that went well, else what Slurm says."""
    answer = ask("scontrol", "requeue", job)
    if answer is None:
        return "scontrol does not answer"
    return answer.stderr.strip() or "scontrol requeue failed" if answer.returncode else ""
