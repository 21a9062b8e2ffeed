"""Starting a training job here, on the nodes of a Slurm job, or as one rank that somebody else started.

The launcher stays until the ranks end. It hands the signals that ask to stop on to them, and gives that
signal itself before the time of its Slurm job is over.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from plait import layout
from plait.config import images
from plait.config.run import factors, processes_per_node, world_size
from plait.errors import CheckpointError, ConfigError, Stopped
from plait.train import debug, lease, slurm, wandb
from plait.train.job import Job
from plait.train.kept import Kept
from plait.train.node import ADDRESSES, environment, named, shares
from plait.train.signals import ASK, ignore, listen

ENV = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
TICK = 0.2
AGAIN = 3.0
"""Seconds after which ranks that were asked to stop are asked again: they may not have listened yet."""
LOOK = 300.0
"""Seconds after which Slurm is asked for the job's end again: it may have been moved."""
log = logging.getLogger(__name__)


def chosen(job: Job) -> Job:
    """The job with its way to start: ``auto`` is decided here.

    Raises:
        ConfigError: the way needs what is not there.
    """
    way, nodes = job.around["launch"], job.around["nodes"]
    allocated = slurm.nodes_of_job() if way in {"auto", "slurm"} and nodes > 1 else []
    if way == "auto":
        way = "slurm" if len(allocated) > 1 else "local"
    if way == "slurm":
        _check_allocation(nodes, allocated)
    if way == "env":
        _check_environment(job)
    return replace(job, around={**job.around, "launch": way})


def _check_allocation(nodes: int, allocated: list[str]) -> None:
    if not slurm.own_job():
        raise ConfigError(
            "launch: slurm, and SLURM_JOB_ID is not set: this is no Slurm job",
            hint="ask by `snakemake --profile slurm`, or from a shell that salloc or sbatch started",
        )
    if nodes > 1 and len(allocated) < nodes:
        raise ConfigError(
            f"the run is spread over nodes {nodes}, Slurm job {slurm.own_job()} has {len(allocated)}: "
            f"{' '.join(allocated)}",
            hint="set the run's `nodes` to what the job has, or ask for a job of more nodes",
        )


def _check_environment(job: Job) -> None:
    absent = [name for name in ENV if not os.environ.get(name)]
    if absent:
        raise ConfigError(
            f"launch: env, and {', '.join(absent)} is not set", hint=f"set {', '.join(ENV)} for each rank"
        )
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise ConfigError(f"{name} is {os.environ[name]!r}; expected a number")
    world, found, rank = world_size(job.settings), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if found != world:
        raise ConfigError(
            f"WORLD_SIZE is {found}, the run has {world} processes: {factors(job.settings)}",
            hint="start as many, or change the run's parallel sizes",
        )
    if rank >= world:
        raise ConfigError(f"RANK is {rank}; expected 0 to {world - 1}")


def command(job: Job, image: str = "") -> list[str]:
    """What starts the processes: one process a node, which becomes torchrun; or the one to debug."""
    python = "python" if image else sys.executable
    module = "plait.train.debug" if job.around["debug"] else "plait.train.node"
    inside = [*contained(image), python, "-m", module, job.to_json()]
    return [*srun(job.machines), *inside] if job.around["launch"] == "slurm" else inside


def srun(nodes: int) -> list[str]:
    """One task on each node, with all that the job has there: torchrun shares it among the ranks."""
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--overlap",
        "--kill-on-bad-exit=1",
    ]


def contained(image: str) -> list[str]:
    """The words that put a command into an image; none without one.

    What it sees of this machine and what it must know, tokens too, stands in the environment.
    """
    return ["apptainer", "exec", "--pwd", str(Path.cwd()), image] if image else []


def launch(job: Job, image: str = "") -> None:
    """Run the job's processes to their end.

    Raises:
        CheckpointError: one of them failed; what it said is above. Or another job writes the run.
        ConfigError: the way to start needs what is not there.
        Stopped: they were asked to stop, and did with all that they had done.
    """
    if job.around["debug"]:
        debug.check_terminal(job.run.run)
        words = command(replace(job, around={**job.around, "launch": "local"}), image)
        os.execvpe(words[0], words, _environment(job, 1, image))  # noqa: S606
    job = chosen(job)
    wandb.check(job.around, here=not image)
    before, kept = _published(job), _kept(job)
    if job.around["launch"] == "env":
        _run_in_place(job, image)
        asked = 0
    else:
        lease.clear(Path(str(job.run)))
        asked = 0 if _published_from_kept(job) else _run_to_the_end(job, image)
    if _published(job) == before:
        _end_early(job, asked, progress=_kept(job) != kept)


def _published(job: Job) -> int:
    """When the checkpoint was written; 0 if it is not there. Folders are listed, so that NFS looks anew."""
    target = Path(job.target)
    if target.name not in os.listdir(target.parent) or layout.MANIFEST not in os.listdir(target):  # noqa: PTH208
        return 0
    return (target / layout.MANIFEST).stat().st_mtime_ns


def _published_from_kept(job: Job) -> bool:
    """Publish, without a process, what a job before this one has saved, where nothing is left to train."""
    kept = Kept(job)
    with lease.hold(Path(str(job.run))):
        if kept.is_done():
            kept.thin_out()
            kept.publish()
            log.info("%s was saved by a job before: it is moved into place", job.target)
            return True
    return False


def _run_in_place(job: Job, image: str) -> None:
    """Be the rank that the environment names."""
    if image:
        raise ConfigError(
            f"launch: env starts nothing, so it cannot start the image {image}",
            hint="start `plait train` in the image, without --image",
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    os.environ |= {**environment(job, here), **os.environ, **named(job)}
    log.info(shares(here, os.environ))
    listen()
    from plait.train.rank import run_rank

    try:
        run_rank(job)
    finally:
        ignore()


def _run_to_the_end(job: Job, image: str) -> int:
    """Start the processes and stay with them; returns the signal that asked them to stop, or 0."""
    forget_rendezvous(job)
    asked: list[int] = []
    for number in ASK:
        signal.signal(number, lambda got, _: asked.append(got))
    clock = Clock.of(job)
    environ = _environment(job, processes_per_node(job.settings, job.machines), image)
    if job.around["launch"] == "slurm":
        environ[ADDRESSES] = json.dumps(slurm.addresses())
    process = subprocess.Popen(command(job, image), env=environ)
    told = 0.0
    while process.poll() is None:
        time.sleep(TICK)
        if not asked and clock.is_over():
            log.warning("the Slurm job ends soon: the run is saved and queued again")
            asked.append(signal.SIGUSR2)
        if asked and time.monotonic() > told + AGAIN:
            told = time.monotonic()
            hand_on(process.pid, in_step=job.around["launch"] == "slurm")
    forget_rendezvous(job)
    if process.returncode:
        raise CheckpointError(
            f"training {job.target} ended with status {process.returncode}; what its ranks said is above",
            hint="asking for the same target again goes on from the newest whole state or checkpoint",
        )
    return asked[0] if asked else 0


def _environment(job: Job, processes: int, image: str) -> dict[str, str]:
    """What the processes of a machine find, in an image too."""
    environ = environment(job, processes)
    return environ | images.environment((), environ) if image else environ


def _kept(job: Job) -> tuple[str, int]:
    """The newest state or checkpoint that the run keeps and when it was written."""
    folders = Path(job.run.states), Path(job.run.saved)
    manifests = (path for folder in folders for path in folder.glob(f"iter_*/{layout.MANIFEST}"))
    written = max(((path.stat().st_mtime_ns, str(path.parent)) for path in manifests), default=(0, ""))
    return written[1], written[0]


def _end_early(job: Job, asked: int, *, progress: bool) -> None:
    """Say what is kept; in a Slurm job that was not to be ended for good, queue it again.

    Slurm cancels and preempts by SIGTERM, and requeues the preempted by itself. A job that did nothing
    would do nothing again.
    """
    where = f"its state is kept in {_kept(job)[0]}" if progress else "it had done no iteration yet"
    own = slurm.own_job()
    if own and progress and asked == signal.SIGUSR2:
        log.warning("training %s stops, %s; Slurm job %s is queued again", job.target, where, own)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        refused = slurm.requeue(own)
        if not refused:
            time.sleep(LOOK)  # Slurm ends this process; until then its job must not look failed
        where += f"; Slurm does not queue job {own} again: {refused}" if refused else ""
    raise Stopped(
        f"training {job.target} was asked to stop, and {where}",
        hint="asking for the same target again goes on from there",
    )


@dataclass
class Clock:
    """When this Slurm job has to be saved.

    Attributes:
        job: the job; "" where there is none, or where its end is not known.
        before: seconds before its end.
    """

    job: str
    before: float
    ends: float | None = None
    looked: float = 0.0

    @classmethod
    def of(cls, job: Job) -> Self:
        """The clock of the Slurm job that this process belongs to.

        Raises:
            ConfigError: the whole of it is shorter than the time to save it.
        """
        own, before = slurm.own_job(), float(job.around["requeue_before"])
        life = slurm.life(own) if own else None
        if life is None or life.ends is None:
            return cls("", before)
        if life.began is not None and life.ends - life.began <= before:
            raise ConfigError(
                f"Slurm job {own} lasts {life.ends - life.began:.0f} s in all, and the run's requeue_before "
                f"is {before:.0f}: nothing would be trained",
                hint="ask for more time (`runtime` of the rule train), or set requeue_before lower",
            )
        return cls(own, before, life.ends, time.monotonic())

    def is_over(self) -> bool:
        """Whether it is time; Slurm is asked anew now and then, for the end may have been moved."""
        if not self.job or self.ends is None:
            return False
        over = time.time() > self.ends - self.before
        if over or time.monotonic() > self.looked + LOOK:
            self.looked = time.monotonic()
            life = slurm.life(self.job)
            self.ends = self.ends if life is None else life.ends
            return self.ends is not None and time.time() > self.ends - self.before
        return False


def hand_on(pid: int, *, in_step: bool) -> None:
    """Ask the ranks to stop: those below a process that listen, or through ``srun``, which hands it on."""
    for one in [pid] if in_step else listeners(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGUSR2)


def listeners(root: int) -> list[int]:
    """The processes below one that have a handler for SIGUSR2; it would end others."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (
                (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            )
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, below = [], [root]
    while below:
        below += children.get(below[0], [])
        found.append(below.pop(0))
    return [one for one in found if _listens(one)]


def _listens(pid: int) -> bool:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        caught = re.search(r"^SigCgt:\s*(\w+)", text, re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR2 - 1) & 1)
    return False


def forget_rendezvous(job: Job) -> None:
    """Remove where the ranks met: a requeued job has the same number, and other ports."""
    for path in Path(str(job.run)).glob(f".rendezvous-{slurm.own_job()}-*.json"):
        path.unlink(missing_ok=True)
