"""The lease of a run's folder: two jobs never write one run, on one machine or on many.

It is a file, ``data/ckpts/{run}/.lease``, that says who writes the run. It is made by link(2), which is
atomic on NFS and Lustre, where flock(2) may do nothing. Its holder beats in it; whoever finds one whose
holder is gone moves it away by rename(2) and makes its own. Rank 0 holds it, not the process that started
the ranks: they may outlive that one, and without rank 0 no other rank ends an iteration.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from plait import files
from plait.errors import CheckpointError
from plait.processes import started
from plait.train import slurm

NAME = ".lease"
BEAT = 20.0
SILENCE = 600.0
"""Seconds without a beat after which a holder that nobody can ask for is taken for dead."""


@dataclass(frozen=True)
class Lease:
    """Who writes a run.

    Attributes:
        host: name of the machine.
        pid: the process.
        started: which process of that number.
        job: its Slurm job, or "".
        beat: when it last said that it lives, in seconds of the epoch.
    """

    host: str
    pid: int
    started: str
    job: str
    beat: float

    @classmethod
    def own(cls) -> Self:
        """A lease of this process."""
        return cls(socket.gethostname(), os.getpid(), started(os.getpid()), slurm.own_job(), time.time())

    @property
    def holder(self) -> tuple[str, int, str]:
        """What one lease of a holder has in common with the next."""
        return self.host, self.pid, self.started

    @classmethod
    def parse(cls, text: str, *, beat: float = 0.0) -> Self:
        """Read what :meth:`to_json` wrote; a later ``beat`` counts."""
        found = json.loads(text)
        beat = max(float(found["beat"]), beat)
        return cls(str(found["host"]), int(found["pid"]), str(found["started"]), str(found["job"]), beat)

    def to_json(self) -> str:
        """The lease as text of a length that no beat changes."""
        return json.dumps(asdict(self) | {"beat": f"{self.beat:.3f}"}) + "\n"

    def state(self) -> Literal["live", "stale"]:
        """Whether its holder may still write."""
        return self._judged[0]

    @property
    def why(self) -> str:
        """How one knows, in a sentence."""
        return self._judged[1]

    @cached_property
    def _judged(self) -> tuple[Literal["live", "stale"], str]:
        who = f"process {self.pid} on {self.host}" + (f" of Slurm job {self.job}" if self.job else "")
        if self.host == socket.gethostname():
            alive = started(self.pid) == self.started
            return ("live", f"{who} runs") if alive else ("stale", f"{who} is gone")
        life = slurm.life(self.job) if self.job else None
        if life is not None and not life.runs:
            return "stale", f"{who}: Slurm has the job {'as ' + life.state if life.state else 'no longer'}"
        if life is not None and life.began is not None and life.began > self.beat:
            return "stale", f"{who}: Slurm has begun the job anew since its last beat"
        if life is not None:
            return "live", f"{who}: Slurm has the job as {life.state}"
        age = time.time() - self.beat
        heard = f"{who} was last heard of {max(age, 0):.0f} s ago"
        return ("stale", heard) if age > SILENCE else ("live", heard)


def read(run: Path) -> Lease | None:
    """The lease of a run's folder, if there is one.

    Raises:
        CheckpointError: what stands there is no lease.
    """
    path = run / NAME
    for last in (False, True):
        try:
            return Lease.parse(path.read_text(encoding="utf-8"), beat=path.stat().st_mtime)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            if last:
                message = f"{path} is no lease: {error!r}"
                raise CheckpointError(message, hint="if nothing trains the run, remove it") from error
            time.sleep(0.1)  # a beat may have been half written
    return None


def refuse_live(run: Path) -> None:
    """Refuse to start where another job writes.

    Raises:
        CheckpointError: it says who.
    """
    found = read(run)
    if found is not None and found.state() == "live":
        raise CheckpointError(
            f"another job is training in {run}: {found.why}",
            hint="wait for it, or end it; the lease of a dead one is taken over by itself",
        )


def clear(run: Path) -> None:
    """Move the lease of a dead job away, before its successor starts where nobody can ask Slurm: in an image.

    Raises:
        CheckpointError: as :func:`refuse_live`.
    """
    refuse_live(run)
    _move_away(run / NAME)


class Held:
    """This process's lease, while it beats in it."""

    def __init__(self, path: Path, lease: Lease, descriptor: int) -> None:
        """Begin to beat; the file is written through ``descriptor``, so a lease moved away is left alone."""
        self.path, self.lease, self._descriptor = path, lease, descriptor
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._heart.start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            text = Lease(*self.lease.holder, self.lease.job, time.time()).to_json().encode()
            with contextlib.suppress(OSError):  # a full or absent disk is found by who writes more than this
                os.pwrite(self._descriptor, text, 0)

    def check(self) -> None:
        """Be sure, before something is published, that the run is still this process's.

        Raises:
            CheckpointError: another has taken it over, for want of beats.
        """
        for last in (False, True):
            found = read(self.path.parent)
            if found is not None and found.holder == self.lease.holder:
                return
            if not last:
                time.sleep(1)  # one that mistook this lease puts it back
        raise CheckpointError(
            f"{self.path} is not of this process any more: {found.why if found else 'it is gone'}",
            hint="this job was silent for too long and was taken for dead; the other one goes on",
        )

    def release(self) -> None:
        """Stop, and leave the run to others."""
        self._over.set()
        self._heart.join()
        os.close(self._descriptor)
        found = read(self.path.parent)
        if found is not None and found.holder == self.lease.holder:
            self.path.unlink(missing_ok=True)


@contextmanager
def hold(run: Path) -> Iterator[Held]:
    """Hold the run's folder.

    Raises:
        CheckpointError: another job holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    held = _take(run / NAME)
    try:
        yield held
    finally:
        held.release()


def _take(path: Path) -> Held:
    """Make the lease; one whose holder is gone is moved away first."""
    for _ in range(5):
        held = _make(path)
        if held is not None:
            return held
        refuse_live(path.parent)
        _move_away(path)
    raise CheckpointError(f"others take {path} over again and again", hint="ask for the run once")


def _make(path: Path) -> Held | None:
    """Make the lease where there is none; link(2) fails where there is one."""
    part = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.part")
    lease = Lease.own()
    part.write_text(lease.to_json(), encoding="utf-8")
    files.sync(part)
    descriptor = os.open(part, os.O_RDWR)
    with contextlib.suppress(FileExistsError):
        os.link(part, path)
    made = os.fstat(descriptor).st_nlink == 2  # NFS may repeat a link that it has made, and then refuse it
    part.unlink()
    if made:
        return Held(path, lease, descriptor)
    os.close(descriptor)
    return None


def _move_away(path: Path) -> None:
    """Take a stale lease away; of several that try, one gets it."""
    found = read(path.parent)
    if found is None or found.state() == "live":
        return
    mine = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.stale")
    try:
        path.rename(mine)
    except FileNotFoundError:
        return
    if Lease.parse(mine.read_text(encoding="utf-8")).holder != found.holder:
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)  # a taker's, made since it was read: give it back
    mine.unlink()
