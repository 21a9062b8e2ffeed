"""One real step of a run made small: `plait train` itself, then again from what it saved."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from plait import layout
from plait.config import Plan
from plait.errors import CheckpointError
from plait.preflight.project import write
from plait.preflight.small import Small
from plait.train.job import Job

LOSS, NORM = "lm loss", "grad norm"
ERROR = "error: "
SHOWN = 3000
"""Characters of what a failed step said, from its first error on: what follows is often another rank's."""


@dataclass(frozen=True)
class Step:
    """What came of it.

    Attributes:
        losses: of the first step, and of the one that goes on from its checkpoint.
        seconds: all in all.
        data: what was trained on.
    """

    losses: list[float]
    seconds: float
    data: str


def tiny_step(plan: Plan, job: Job, small: Small) -> Step:
    """Train a step, save, load what was saved, and train another; nothing of it is left.

    Raises:
        CheckpointError: a step failed, or its loss is no number.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plait-preflight-") as folder:
        root = Path(folder)
        first, data = write(root, small, plan, job)
        second = layout.Iteration(run=layout.Iteration.parse(first.target).run, iteration=2)
        for one in (first, replace(first, start=first.target, target=str(second))):
            _train(one, root)
        metrics = (root / first.run.metrics).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in metrics.splitlines()]
    for row in rows:
        if not all(math.isfinite(float(row[name])) for name in (LOSS, NORM)):
            raise CheckpointError(f"the tiny step has {LOSS} {row[LOSS]} and {NORM} {row[NORM]}")
    return Step([row[LOSS] for row in rows], time.monotonic() - began, data)


def _train(job: Job, root: Path) -> None:
    """The command that the workflow runs, in the folder, as if no Slurm were here."""
    words = [
        sys.executable,
        "-m",
        "plait.cli.main",
        "train",
        job.start,
        job.analysis,
        job.schedule,
        job.target,
    ]
    words += ["--settings", json.dumps(job.settings), "--around", json.dumps(job.around)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(words, cwd=root, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        said = "\n".join(line for line in lines if not line.startswith(ERROR))
        began = said.find("Traceback")
        print(said[began:][:SHOWN] if began >= 0 else said[-SHOWN:], file=sys.stderr)  # noqa: T201
        raise CheckpointError(f"the tiny step failed: {errors[0] if errors else 'what it said is above'}")
