"""What a run tells while it trains: a jsonl file, TensorBoard, W&B, and a bar or lines."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from plait.files import appears_whole, sync
from plait.train import wandb

log = logging.getLogger(__name__)


class Metrics:
    """The record of a run; rows of the iterations that a job trains are dropped first, others stay."""

    def __init__(self, run: Path, *, start: int, stop: int, logged: Mapping[str, Any]) -> None:
        """Open the run's files to go on after iteration ``start``; ``logged`` are keys of the run."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [line for line in self._lines() if not start < _iteration(line) <= stop]
        self._write(rows)
        later = any(_iteration(line) > stop for line in rows)
        self.writer = SummaryWriter(run / "tensorboard", purge_step=None if later else start + 1)
        self.wandb = wandb.of(run, logged)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=stop, initial=start, unit="it", disable=not terminal)
        self.lines = not terminal
        self.stop = stop
        self.every = logged["log_interval"]

    def _write(self, lines: list[str]) -> None:
        with appears_whole(self.path) as part:
            part.write_text("".join(lines), encoding="utf-8")

    def _lines(self) -> list[str]:
        """The whole lines of the file; a job killed while writing may have left half of one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def __enter__(self) -> Self:
        """The record itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, the rows in order of their iterations."""
        self._write(sorted(self._lines(), key=_iteration))
        self.writer.close()
        self.wandb.close()
        self.bar.close()

    def sync(self) -> None:
        """Make the rows so far durable."""
        if self.path.exists():
            sync(self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Keep one iteration: its number and its figures by Megatron's names."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        iteration = row["iteration"]
        for name, value in row.items():
            if name != "iteration":
                self.writer.add_scalar(name, value, iteration)
        self.wandb.write(row)
        self.bar.update(iteration - self.bar.n)
        self.bar.set_postfix_str(f"lm loss {row['lm loss']:.3f}" if "lm loss" in row else "skipped")
        if self.lines and (iteration % self.every == 0 or iteration == self.stop):
            figures = " | ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "iteration")
            log.info("iteration %d/%d | %s", iteration, self.stop, figures)


def _iteration(line: str) -> int:
    """The iteration of a row."""
    return int(json.loads(line)["iteration"])
