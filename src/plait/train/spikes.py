"""Jumps of the loss: one line of JSON on the log, a row of events.jsonl, a mark in the curve.

An iteration is a spike where its lm loss is not finite, or exceeds the median of the ten trained iterations
before it (of all, where there are fewer) by more than ``spike_threshold`` times that median. A median forgets
a single spike, and takes up a loss that stays high after five iterations. The reference is read from the
rows of metrics.jsonl, so a run that goes on judges as one that never stopped.
"""

import logging
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from plait.layout import EVENTS, SAMPLES
from plait.train import lineage
from plait.train.rows import Rows, to_line

WINDOW = 10
LOSS, SPIKE = "lm loss", "loss spike"
log = logging.getLogger(__name__)


class Spikes:
    """Watches the losses of a run."""

    def __init__(
        self, run: Path, threshold: float | None, before: list[dict[str, Any]], events: Rows
    ) -> None:
        """Go on after the rows ``before``; without a threshold nothing is a spike."""
        self.run, self.threshold, self.events = run, threshold, events
        losses = (float(row[LOSS]) for row in before if LOSS in row)
        self.losses = deque(filter(math.isfinite, losses), maxlen=WINDOW)

    @classmethod
    def of(cls, run: Path, threshold: float | None, rows: Rows) -> "Spikes":
        """Those of the run whose metrics have these rows."""
        events = Rows(run / EVENTS, start=rows.start, stop=rows.stop)
        return cls(run, threshold, rows.before(), events)

    def check(self, row: dict[str, Any]) -> dict[str, float]:
        """What an iteration's row gets besides: how far its loss jumped, as a share of the reference."""
        if self.threshold is None or LOSS not in row:
            return {}
        loss, reference = row[LOSS], median(self.losses) if self.losses else math.inf
        jump = math.inf
        if math.isfinite(loss):
            self.losses.append(loss)
            if loss <= reference * (1 + self.threshold):
                return {}
            jump = loss / reference - 1 if reference else math.inf
        self._tell(row["iteration"], {LOSS: loss, "reference": reference, "jump": jump})
        return {SPIKE: jump}

    def _tell(self, iteration: int, figures: dict[str, float]) -> None:
        """Log the event, with the samples of the iteration and the raw lines that they are made from."""
        folder = self.run / SAMPLES
        step = lineage.of_step(folder, iteration)
        samples = [*step.samples.values()] if step else []
        event = {
            "iteration": iteration,
            "event": SPIKE,
            **figures,
            "threshold": self.threshold,
            "samples": samples,
            "lines": lineage.lines_of(samples, lineage.sources(folder)),
            "see": f"plait trace {self.run.name} --step {iteration}",
        }
        self.events.write(event)
        log.warning("%s", to_line(event))
