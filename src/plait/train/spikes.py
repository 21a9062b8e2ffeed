"""Jumps of the loss: one line of JSON on the log, a row of events.jsonl, a mark in the curve.

An iteration is a spike where its lm loss is not finite, or exceeds the median of the ten trained iterations
before it (of all, where there are fewer) by more than ``spike_threshold`` times that median. A median forgets
a single spike, and takes up a loss that stays high after five iterations. Of a stretch of losses that are not
finite the first is told with its samples and lines, the others are marks only, and the finite loss after it
says how many they were. All of this is read from the rows of metrics.jsonl, so a run that goes on judges as
one that never stopped.
"""

import logging
import math
from collections import deque
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from plait.layout import EVENTS, SAMPLES
from plait.train import lineage
from plait.train.rows import Rows, to_line

WINDOW = 10
LOSS, SPIKE, OVER = "lm loss", "loss spike", "loss finite again"
log = logging.getLogger(__name__)


class Spikes:
    """Watches the losses of a run."""

    def __init__(
        self, run: Path, threshold: float | None, before: list[dict[str, Any]], events: Rows
    ) -> None:
        """Go on after the rows ``before``; without a threshold nothing is a spike."""
        self.run, self.threshold, self.events = run, threshold, events
        self.losses = deque[float](maxlen=WINDOW)
        """The last finite ones."""
        self.stretch: list[int] = []
        """Iterations since then, told or marked, whose losses are not finite."""
        for row in before:
            self._remember(row)

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
        finite, told = math.isfinite(loss), bool(self.stretch)
        if finite and told:
            self._tell_end(row["iteration"], loss)
        more = {}
        if not finite or loss > reference * (1 + self.threshold):
            more[SPIKE] = loss / reference - 1 if finite and reference else math.inf
            if finite or not told:
                self._tell(row["iteration"], {LOSS: loss, "reference": reference, "jump": more[SPIKE]})
        self._remember(row | more)
        return more

    def _remember(self, row: dict[str, Any]) -> None:
        """Take a row up into what the next are compared with."""
        if math.isfinite(loss := float(row.get(LOSS, "nan"))):
            self.losses.append(loss)
            self.stretch = []
        elif SPIKE in row:
            self.stretch.append(row["iteration"])

    @cached_property
    def _shards(self) -> list[Path]:
        """What the numbers of samples stand for; the run's log says it before the first iteration."""
        return lineage.sources(self.run / SAMPLES)

    def _tell(self, iteration: int, figures: dict[str, float]) -> None:
        """Log the event, with the samples of the iteration and the raw lines that they are made from."""
        step = lineage.of_step(self.run / SAMPLES, iteration)
        samples = [*step.samples.values()] if step else []
        self._write(
            {
                "iteration": iteration,
                "event": SPIKE,
                **figures,
                "threshold": self.threshold,
                "samples": samples,
                "lines": lineage.lines_of(samples, self._shards),
                "see": f"plait trace {self.run.name} --step {iteration}",
            }
        )

    def _tell_end(self, iteration: int, loss: float) -> None:
        """Log how many iterations before this one had no finite loss."""
        first, last = self.stretch[0], self.stretch[-1]
        stretch = {"first": first, "last": last, "iterations": len(self.stretch)}
        self._write({"iteration": iteration, "event": OVER, LOSS: loss, **stretch})

    def _write(self, event: dict[str, Any]) -> None:
        self.events.write(event)
        log.warning("%s", to_line(event))
