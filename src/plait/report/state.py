"""What stands and what goes on: runs and who writes them, what killed jobs left, Snakemake's own lock.

Runs are known by what lies in ``data/ckpts``, whether the config still has them or not.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plait import files, layout
from plait.errors import DataError, PlaitError
from plait.train import lease

DATA, LOCKS = Path("data"), Path(".snakemake/locks")
SAVED = re.compile(r"iter_(\d{7})")
STATES = ".state"
KEEPS = (STATES, ".saved")
TRAINED = re.compile(r"\.iter_\d{7}\.part")
"""A checkpoint that is being written, by all ranks of whoever has the run's lease."""
SPLIT = re.compile(r"\..+\.parts")
"""What the jobs of a conversion have written, until one more puts it into place."""
RUNS = "ckpts"


# Runs


def runs(name: str = "") -> list[layout.Run]:
    """The runs that have a folder, or the one of this name.

    Raises:
        DataError: it has none; those that have are named.
    """
    folders = DATA / RUNS
    found = sorted(path.name for path in folders.iterdir() if _is_run(path)) if folders.is_dir() else []
    if name and name not in found:
        raise DataError(f"there is no {folders / name}", hint=f"known: {', '.join(found) or 'none'}")
    return [layout.Run(run=one) for one in ([name] if name else found)]


def _is_run(path: Path) -> bool:
    return path.is_dir() and layout.Run.read(path.as_posix()) is not None


def of_run(run: layout.Run) -> Iterator[str]:
    """What can be said of a run, a line each; what is damaged is named."""
    try:
        yield from _of_run(run)
    except PlaitError as error:
        yield f"damaged: {error}"


def _of_run(run: layout.Run) -> Iterator[str]:
    folder = Path(str(run))
    saved = checkpoints(folder)
    yield f"lease: {_held(folder)}"
    yield f"checkpoints: {', '.join(path.name for path in saved) or 'none'}"
    if saved:
        yield f"newest: {saved[-1]}{_told(saved[-1])}"
    waiting = checkpoints(Path(run.saved))
    if waiting:
        names = ", ".join(path.name for path in waiting)
        yield f"saved: {names}; asking for each moves it into place, if it still fits"
    crash = checkpoints(folder / STATES)
    if crash:
        yield f"crash state: {crash[-1]}; asking for the next checkpoint goes on from it"
    exports = sorted((folder / "hf").glob("model_iter_*"), key=lambda path: (len(path.name), path.name))
    if exports:
        yield f"exports: {', '.join(path.name for path in exports if (path / layout.MANIFEST).is_file())}"
    if Path(run.leaks).is_file() and (leaks := Path(run.leaks).read_bytes().count(b"\n")):
        yield f"samples that it evaluates and trains: {leaks}, in {run.leaks}"
    row = last_row(Path(run.metrics))
    if row:
        yield f"last row of {layout.METRICS}: {row}"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if SAVED.fullmatch(path.name) and path.is_dir()]
    return sorted(path for path in found if (path / layout.MANIFEST).is_file())


def last_row(metrics: Path) -> str:
    """The last line of a run's metrics, without reading those before it."""
    if not metrics.is_file():
        return ""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = file.read().splitlines()
    return lines[-1].decode(errors="replace")[:160] if lines else ""


def _held(folder: Path) -> str:
    """Who writes the run, and what to do where nobody does any more."""
    try:
        found = lease.read(folder)
    except PlaitError as error:
        return str(error)
    if found is None:
        return "free, nobody trains it"
    state = found.state()
    after = "" if state == "live" else "; the next job takes it over by itself"
    return f"{state}, {found.why}{after}"


def _told(iteration: Path) -> str:
    """What a checkpoint's manifest says of its run; the config may have lost it."""
    manifest = files.read_manifest(iteration, kind="iteration")
    chosen, grid = manifest["settings"], manifest["facts"].get("grid", {})
    words = [f"{key} {chosen[key]}" for key in ("recipe", "model", "mixture") if key in chosen]
    words += [f"tp{grid['tp']} pp{grid['pp']}"] if grid else []
    words += ["adopted"] if manifest.get("adopted") else []
    return f" ({', '.join(words)})" if words else ""


# What killed jobs left


@dataclass(frozen=True)
class Part:
    """Something half written, beside the target that it would have become."""

    path: Path

    @property
    def state(self) -> str:
        """``live``, ``gone``, or ``unknown`` where its machine cannot be asked from here."""
        if self.is_split:
            within = [one.state for one in _half_written(self.path)] + ["live"] * bool(workflow_lock())
            return next((state for state in ("live", "unknown") if state in within), "gone")
        if not self.host:
            folder = self.path.parent
            try:
                found = lease.read(folder.parent if folder.name in KEEPS else folder)
            except PlaitError:
                return "unknown"
            return "live" if found is not None and found.state() == "live" else "gone"
        if self.host == socket.gethostname():
            return "live" if Path(f"/proc/{self.pid}").exists() else "gone"
        return "gone" if _idle(self.host) else "unknown"

    @property
    def is_split(self) -> bool:
        """Whether jobs of a conversion write it, each a part."""
        return bool(SPLIT.fullmatch(self.path.name))

    @property
    def pid(self) -> int:
        """The process that writes it; 0 where several do."""
        found = files.PART.fullmatch(self.path.name)
        return int(found["pid"]) if found else 0

    @property
    def host(self) -> str:
        """That process's machine; empty where several write it."""
        found = files.PART.fullmatch(self.path.name)
        return found["host"] if found else ""

    @property
    def writer(self) -> str:
        """Who writes it, in words."""
        if self.is_split:
            return "a conversion of several jobs"
        return f"process {self.pid} on {self.host}" if self.host else "the holder of the run's lease"

    @property
    def bytes(self) -> int:
        """Its size."""
        if not self.path.is_dir():
            return self.path.lstat().st_size
        return sum(path.lstat().st_size for path in self.path.rglob("*") if not path.is_dir())


def parts() -> list[Part]:
    """Everything half written below ``data/``; a ``.part`` of a download is another thing, and goes on."""
    return sorted(_half_written(DATA), key=lambda part: part.path)


def _half_written(within: Path) -> Iterator[Part]:
    for folder, names, others in os.walk(within):
        half = {
            name
            for name in (*names, *others)
            if any(kind.fullmatch(name) for kind in (files.PART, TRAINED, SPLIT))
        }
        yield from (Part(Path(folder, name)) for name in half)
        names[:] = [name for name in names if name not in half and name != ".git"]


def clean(found: list[Part]) -> list[Part]:
    """Remove what dead processes left; those that were removed."""
    dead = [part for part in found if part.state == "gone"]
    for part in dead:
        files.remove(part.path)
    return dead


def _idle(host: str) -> bool:
    """Whether Slurm knows a machine and has no job of this user on it."""
    if shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", f"--nodelist={host}", "--format=%i"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0 and not asked.stdout.strip()


# Snakemake


def workflow_lock() -> str:
    """Whether Snakemake has locked this folder, and how to unlock it; empty if it has not."""
    if not LOCKS.is_dir() or not any(LOCKS.iterdir()):
        return ""
    drivers = [pid for pid in _processes() if pid != os.getpid()]
    if drivers:
        return f"locked; snakemake runs in this folder as process {', '.join(map(str, drivers))}"
    return (
        f"locked, and no snakemake runs in this folder on {socket.gethostname()}; if none does elsewhere: "
        "snakemake --unlock"
    )


def _processes() -> Iterator[int]:
    """Processes of Snakemake whose working folder is this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")[:4]
                here = (entry / "cwd").resolve(strict=True) == Path.cwd().resolve()
            except OSError:
                continue
            if here and any(Path(os.fsdecode(word)).name == "snakemake" for word in words):
                yield int(entry.name)
