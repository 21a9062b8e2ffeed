"""What a host has of what plait can use, a line each: from packages of the wrong version to fast networks."""

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plait.envs.recipes import LOCK
from plait.errors import ConfigError

GIB = 1 << 30
NEEDS = {"apptainer", "slurm", "gpu"}
PATIENCE = 20.0
SHARED = Path("/dev/shm")  # noqa: S108 - its size is asked
NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, whether it is here, and what to do where it is not."""

    name: str
    state: Literal["ok", "missing", "note"]
    said: str

    @property
    def missing(self) -> bool:
        """Whether it is needed, and not here."""
        return self.state == "missing"

    def __str__(self) -> str:
        """As it is printed."""
        return f"{self.state:8} {self.name:16} {self.said}"


def findings(needs: set[str], envs: Path) -> Iterator[Finding]:
    """Look at this host.

    Args:
        needs: what it is for besides running stages in this environment: apptainer, slurm, gpu.
        envs: the folder of the lock file.

    Raises:
        ConfigError: there is no such need.
    """
    unknown = needs - NEEDS
    if unknown:
        raise ConfigError(f"{min(unknown)!r} is no need", hint=f"needs are: {', '.join(sorted(NEEDS))}")
    yield from packages(envs / LOCK)
    yield from disk()
    yield from apptainer(needed="apptainer" in needs)
    yield from slurm(needed="slurm" in needs)
    yield from gpu(needed="gpu" in needs)


def _finding(name: str, found: object, otherwise: str, *, needed: bool, here: object = None) -> Finding:
    """Here, if something was found (or as ``here`` says); else needed and missing, or only a note."""
    if found if here is None else here:
        return Finding(name, "ok", str(found))
    return Finding(name, "missing" if needed else "note", otherwise)


def said(*command: str) -> str:
    """The first line that a command says; empty where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return (lines[0] if lines else "it works") if done.returncode == 0 else ""


def packages(lock: Path) -> Iterator[Finding]:
    """Each package that is not of the locked version; one line if all are."""
    if not lock.is_file():
        yield Finding("packages", "note", f"{lock} is not here: versions are not compared")
        return
    wanted = dict(re.findall(r"^([\w.-]+)==(\S+)$", lock.read_text(encoding="utf-8"), re.MULTILINE))
    right = 0
    for name, version in wanted.items():
        found = _version(name)
        if found.partition("+")[0] == version:
            right += 1
        else:
            yield Finding(name, "missing", f"{found or 'not installed'}, expected {version}: make env")
    if right == len(wanted):
        yield Finding("packages", "ok", f"{right} as in {lock}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def disk() -> Iterator[Finding]:
    """Room where artifacts and temporary files go."""
    for name, folder, least in (("data", "data", 5), ("temporary files", tempfile.gettempdir(), 1)):
        path = Path(folder).resolve()
        there = next(one for one in (path, *path.parents) if one.is_dir())
        free, writable = shutil.disk_usage(there).free / GIB, os.access(there, os.W_OK)
        how = f"{free:.0f} GB free in {there}" + ("" if writable else ", where you may not write")
        yield _finding(name, how, f"{how}, expected {least}", needed=True, here=writable and free >= least)


def apptainer(*, needed: bool) -> Iterator[Finding]:
    """The command, and what it needs of the kernel to run as an ordinary user."""
    found = said("apptainer", "--version")
    yield _finding("apptainer", found, "not on PATH, needed for --sdm apptainer", needed=needed)
    spaces = said("unshare", "--user", "--map-root-user", "true") and "you may make them"
    yield _finding(
        "user namespaces", spaces, "none for you: ask for kernel.unprivileged_userns_clone", needed=needed
    )
    # Apptainer looks beside itself too.
    places = f"{os.environ['PATH']}:{Path(shutil.which('apptainer') or '/').resolve().parent}"
    helper = shutil.which("squashfuse", path=places) or shutil.which("squashfuse_ll", path=places)
    mounts = helper and os.access("/dev/fuse", os.R_OK | os.W_OK)
    why = "/dev/fuse is not yours" if helper else "no squashfuse"
    do = "a .sif may not start; name folders in `images`: apptainer build --sandbox FOLDER X.sif"
    how = f"{helper} and /dev/fuse"
    yield _finding("squashfs mounts", how, f"{why}: {do}", needed=False, here=bool(mounts))
    cache = Path(os.environ.get("APPTAINER_CACHEDIR") or Path.home() / ".apptainer")
    there = next(one for one in (cache, *cache.parents) if one.is_dir())
    free = shutil.disk_usage(there).free / GIB
    how = f"{free:.0f} GB free in {there}"
    yield _finding(
        "image cache", how, f"{how}: the GPU image wants 60 to be built; set APPTAINER_CACHEDIR",
        needed=False, here=free >= 60,
    )  # fmt: skip


def slurm(*, needed: bool) -> Iterator[Finding]:
    """The commands, and whether a controller answers."""
    for name in ("sbatch", "srun"):
        yield _finding(
            name, said(name, "--version"), "not on PATH, needed for --profile slurm", needed=needed
        )
    yield _finding("slurmctld", said("scontrol", "ping"), "no controller answers", needed=needed)


def gpu(*, needed: bool) -> Iterator[Finding]:
    """The driver, and what NCCL can use."""
    driver = NVIDIA.read_text(encoding="utf-8").splitlines()[0] if NVIDIA.is_file() else ""
    yield _finding("GPU driver", driver, "none: login nodes need none, training on GPUs does", needed=needed)
    shared = shutil.disk_usage(SHARED).total / GIB if SHARED.is_dir() else 0
    how = f"{SHARED} has {shared:.1f} GB"
    yield _finding("shared memory", how, f"{how}, NCCL wants 1", needed=needed, here=shared >= 1)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    how = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / GIB:.1f} GB"
    yield _finding(
        "locked memory",
        how,
        f"{how}: InfiniBand wants `ulimit -l unlimited`",
        needed=False,
        here=how == "unlimited",
    )
    up = _names(path.parent for path in Path("/sys/class/net").glob("*/operstate") if _is_up(path))
    yield _finding("network", up, "no interface is up but loopback: one node only", needed=False)
    fast = _names(Path("/sys/class/infiniband").glob("*"))
    yield _finding("InfiniBand", fast, "none: NCCL takes TCP", needed=False)


def _is_up(state: Path) -> bool:
    return state.parent.name != "lo" and state.read_text(encoding="utf-8").strip() == "up"


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths))
