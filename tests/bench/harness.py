"""Pairs of ours and a peer, run in turn on the same input: each ratio beside its target.

Every way of a row is a process of its own, a child of this one, that loads its modules before the clock
starts. Rounds have seeds of their own, and each begins with the way that the last one ended with. The ratio
is the peer's time to ours, the median of the rounds; memory is the most that the process of ours had.
"""

import contextlib
import cProfile
import io
import json
import math
import os
import pstats
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "train"), str(ROOT / "tests" / "tokens")]
PROFILED = 4
"""Functions that "where the time goes" names."""


@dataclass(frozen=True)
class Row:
    """Something of ours beside a peer.

    Attributes:
        name: without spaces, for the command line.
        target: the least ratio; None: what there is no promise of.
        make: writes the input of a seed into an empty folder.
        ours, peer: read the input and write into an empty folder. They may return what they have timed
            themselves.
        check: compares what ours and the peer wrote, in each round, and returns a few words.
        warm: what both have done before the clock starts, besides loading modules.
        per: "core", seconds of processor of all processes, or "wall", seconds.
        cold: files of the input are not in memory when the clock starts.
        rounds: how many seeds.
        looked_at: what is profiled in place of ours, where that works in processes of its own.
        most: MB that ours may have.
    """

    name: str
    target: float | None
    make: Callable[[Path, int], None]
    ours: Callable[[Path, Path], "Own | None"]
    peer: Callable[[Path, Path], "Own | None"]
    check: Callable[[Path, Path, Path], str] = lambda *_: ""
    warm: Callable[[], None] = lambda: None
    per: str = "core"
    cold: bool = False
    rounds: int = 3
    looked_at: Callable[[Path, Path], None] | None = None
    most: float = math.inf


@dataclass(frozen=True)
class Told:
    """What a child found out.

    Attributes:
        value: ratio or seconds.
        where: the time goes, in words.
        memory: MB of the process of ours that had most; 0: this one.
    """

    value: float
    where: str = ""
    memory: float = 0


@dataclass(frozen=True)
class Figure:
    """Something that has no peer but a bound, or is measured from inside: one process gives the ratio.

    Attributes:
        name: without spaces, for the command line.
        target: the least ratio.
        measure: what a seed gives.
        rounds: how many seeds.
        most: MB that ours may have.
    """

    name: str
    target: float | None
    measure: Callable[[int], Told]
    rounds: int = 3
    most: float = math.inf


@dataclass(frozen=True)
class Own:
    """What a way has timed itself: without reading and writing, or in processes of its own.

    Attributes:
        seconds: of processor or by the clock, as the row says.
        memory: MB of the process that had most; 0: this one.
    """

    seconds: float
    memory: float = 0


KB = 1024 / 1e6
"""MB of what Linux counts memory in."""


def peak() -> float:
    """MB of memory that this process had at most; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * KB


def peak_of_children() -> float:
    """MB of the process that had most, of those that this one has started and that have ended.

    What this one had when it started them counts too: it is to be smaller than they are.
    """
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KB


# In a child


def child(row: Row | Figure, what: str, words: list[str]) -> None:
    """Do one thing of a row, and print what came of it as the last line."""
    if isinstance(row, Figure):
        told = row.measure(int(words[0]))
    elif what in ("ours", "peer"):
        told = _timed(row, what, *map(Path, words))
    else:
        told = Told(0.0, _profiled(row, *map(Path, words)))
    print(json.dumps([told.value, told.where, told.memory or peak()]))  # noqa: T201


def _timed(row: Row, what: str, source: Path, target: Path) -> Told:
    row.warm()
    wall, before = time.perf_counter(), processor()
    own = getattr(row, what)(source, target)
    seconds = processor() - before if row.per == "core" else time.perf_counter() - wall
    return Told(own.seconds, memory=own.memory) if own else Told(seconds)


def processor() -> float:
    """Seconds that this process and its children, as far as they have ended, had of a processor."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _profiled(row: Row, source: Path, target: Path) -> str:
    """The functions of ours that most of the time is spent in itself."""
    row.warm()
    profile = cProfile.Profile()
    profile.runcall(row.looked_at or row.ours, source, target)
    table = pstats.Stats(profile, stream=io.StringIO()).stats  # type: ignore[attr-defined]
    whole = sum(spent[2] for spent in table.values())
    most = sorted(table.items(), key=lambda one: -one[1][2])[:PROFILED]
    return ", ".join(f"{_named(*key)} {spent[2] / whole:.0%}" for key, spent in most)


def _named(file: str, _: int, function: str) -> str:
    """A function in few words, without this machine's paths or addresses."""
    words = function.strip("<>").replace("built-in method ", "").replace("method ", "")
    words = words.partition(" at 0x")[0].replace("' of '", " of ").replace("'", "").replace(" objects", "")
    return words if file in ("~", "") else f"{Path(file).stem}.{words}"


# The parent


def measured(row: Row | Figure) -> tuple[list[float], float, str, str]:
    """Ratios of the rounds, MB, where the time goes, and what the check says."""
    if isinstance(row, Figure):
        found = [_told(row.name, "figure", str(seed)) for seed in range(row.rounds)]
        return [one.value for one in found], max(one.memory for one in found), found[-1].where, ""
    ratios, memory = [], 0.0
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_ROOT")) as temporary:
        root = Path(temporary)
        for seed in range(row.rounds):
            _emptied(root / "input")
            row.make(root / "input", seed)
            turn = ("ours", "peer") if seed % 2 == 0 else ("peer", "ours")
            found = {what: _round(row, what, root) for what in turn}
            ratios.append(found["peer"].value / found["ours"].value)
            memory = max(memory, found["ours"].memory)
            said = row.check(root / "input", root / "ours", root / "peer")
        where = _told(row.name, "profile", str(root / "input"), str(_emptied(root / "ours"))).where
    return ratios, memory, where, said


def _round(row: Row, what: str, root: Path) -> Told:
    _emptied(root / what)
    os.sync()
    for path in (root / "input").rglob("*"):
        if path.is_file():
            _touch(path, cold=row.cold)
    return _told(row.name, what, str(root / "input"), str(root / what))


def _emptied(folder: Path) -> Path:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _touch(path: Path, *, cold: bool) -> None:
    with path.open("rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
"""Each way is measured on one core, as the jobs of the workflow run."""


def _told(*words: str) -> Told:
    command = [sys.executable, "-m", "tests.bench", "--child", *words]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    if ended.returncode:
        sys.stderr.write(ended.stderr)
        last = (ended.stderr.strip() or f"status {ended.returncode}").splitlines()[-1]
        raise RuntimeError(f"{' '.join(words[:2])}: {last}")
    return Told(*json.loads(ended.stdout.splitlines()[-1]))


LOOP = 5_000_000


def pace() -> str:
    """How fast one core is just now: what is bound in seconds, not to a peer, goes with it."""
    begun = time.process_time()
    for _ in range(LOOP):
        pass
    return f"an empty loop of {LOOP:,} rounds takes {time.process_time() - begun:.3f} s"


HEAD = f"{'row':34}{'ratio':>8}{'least':>8}{'':8}{'MB':>7}   where the time goes"


FAULTS = (AssertionError, LookupError, OSError, RuntimeError, ValueError)
"""What a row raises whose check fails, whose process ends by an error, or whose files are not there."""


def printed(row: Row | Figure) -> bool:
    """Measure a row and print its line; whether it is as it has to be."""
    try:
        ratios, memory, where, said = measured(row)
    except FAULTS as error:  # the rows after it are measured all the same
        traceback.print_exc()
        print(f"{row.name:34}failed: {str(error) or repr(error)}".splitlines()[0], flush=True)  # noqa: T201
        return False
    ratio = statistics.median(ratios)
    least = "" if row.target is None else f"{row.target:.4g}"
    met = (row.target is None or ratio >= row.target) and memory <= row.most
    words = "; ".join(filter(None, (said, where)))
    line = f"{row.name:34}{ratio:8.4g}{least:>8}{'' if met else ' missed':8}{memory:7.0f}   {words}"
    print(line, flush=True)  # noqa: T201
    return met
