"""What a run tells while it trains: a jsonl file, TensorBoard, W&B, and a bar or lines."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from plait.layout import METRICS
from plait.train import wandb
from plait.train.rows import Rows
from plait.train.spikes import Spikes

log = logging.getLogger(__name__)


class Metrics:
    """The record of a run; rows of the iterations that a job trains are dropped first, others stay."""

    def __init__(self, run: Path, *, start: int, stop: int, logged: Mapping[str, Any]) -> None:
        """Open the run's files to go on after iteration ``start``; ``logged`` are keys of the run."""
        from torch.utils.tensorboard import SummaryWriter

        self.rows = Rows(run / METRICS, start=start, stop=stop)
        self.spikes = Spikes.of(run, logged["spike_threshold"], self.rows)
        purged = None if self.rows.later else start + 1
        self.writer = SummaryWriter(run / "tensorboard", purge_step=purged)
        self.wandb = wandb.of(run, logged)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=stop, initial=start, unit="it", disable=not terminal)
        self.lines = not terminal
        self.stop = stop
        self.every = logged["log_interval"]

    def __enter__(self) -> Self:
        """The record itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, the rows in order of their iterations."""
        self.rows.close()
        self.spikes.events.close()
        self.writer.close()
        self.wandb.close()
        self.bar.close()

    def sync(self) -> None:
        """Make the rows so far durable."""
        self.rows.sync()
        self.spikes.events.sync()

    def write(self, row: dict[str, Any]) -> None:
        """Keep one iteration: its number and its figures by Megatron's names."""
        row = row | self.spikes.check(row)
        self.rows.write(row)
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
