"""A run's losses as a picture, from its metrics.jsonl; equal rows give equal bytes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import DataError, LayoutError
from plait.tokens.style import COLOURS

FORMS = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
"""Kinds of picture, and the metadata that would make equal pictures differ."""
SETTINGS = {"svg.hashsalt": "plait", "svg.fonttype": "path", "font.size": 9, "axes.linewidth": 0.6}
INK, GREY = "#1d2733", "#56616d"
SMOOTHED = 20
"""A smoothed curve's window is this part of the run."""


@dataclass(frozen=True)
class Curve:
    """Figures of a run, one an iteration, by Megatron's names."""

    iteration: NDArray[np.int64]
    loss: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    validation: NDArray[np.float64]
    """Not a number where the run was not evaluated."""
    spike: NDArray[np.float64]
    """How far the loss jumped, as a share of what it was; not a number where it did not."""

    @property
    def spikes(self) -> list[int]:
        """The iterations whose loss jumped."""
        return [int(one) for one in self.iteration[~np.isnan(self.spike)]]


def read(path: Path, *, last: int | None = None) -> Curve:
    """Read the iterations up to ``last``; those after it belong to another picture.

    Raises:
        DataError: the file is missing, holds none of them, or a line is not a row of metrics.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist", hint="training writes it; without it nothing can be drawn")
    rows: list[tuple[float, ...] | None] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n"):  # a job killed while writing leaves half a line
            rows.append(_row(line, f"{path} line {number}"))
    kept = [row for row in rows if row is not None and (last is None or row[0] <= last)]
    if not kept:
        raise DataError(f"{path} holds no iteration{'' if last is None else f' up to {last}'}")
    iteration, *columns = (np.array(column) for column in zip(*kept, strict=True))
    return Curve(iteration, *columns)


def _row(line: str, where: str) -> tuple[float, ...] | None:
    """A row's figures; None for an iteration that was left out."""
    try:
        row = json.loads(line)
        if "skipped samples" in row:
            return None
        return (
            int(row["iteration"]),
            float(row["lm loss"]),
            float(row["grad norm"]),
            float(row["learning-rate"]),
            float(row.get("validation lm loss", "nan")),
            float(row.get("loss spike", "nan")),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where} is not a row of metrics: {line.strip()[:80]!r}") from error


def draw(curve: Curve, target: Path, *, form: str, name: str, exports: Sequence[int] = ()) -> None:
    """Draw the loss, and below it gradient norm and learning rate.

    Args:
        curve: what is drawn.
        target: the file that is written.
        form: svg or png.
        name: the run.
        exports: iterations that are marked as exported.

    Raises:
        LayoutError: the form is another one.
    """
    if form not in FORMS:
        raise LayoutError(
            f"a loss curve cannot be drawn as {form!r}", hint=f"end it in .{' or .'.join(FORMS)}"
        )
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with style.context(["default", SETTINGS]):
        figure = Figure(figsize=(9, 5.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        FigureCanvasAgg(figure)
        axes: dict[str, Any] = figure.subplot_mosaic(
            [["loss", "loss"], ["norm", "rate"]], height_ratios=[2.4, 1]
        )
        _loss(axes["loss"], curve, name, [step for step in exports if step in curve.iteration])
        _small(axes["norm"], curve, curve.grad_norm, "grad norm", COLOURS[1])
        _small(axes["rate"], curve, curve.learning_rate, "learning rate", COLOURS[2])
        figure.savefig(target, format=form, dpi=160, metadata=FORMS[form])


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of each value and those before it, ``window`` in all, fewer at the start; of finite ones."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    numbers = counts[ends] - counts[starts]
    return np.where(numbers, (sums[ends] - sums[starts]) / np.maximum(numbers, 1), np.nan)


def sentence(curve: Curve) -> str:
    """How far the loss went, in words, and where it jumped."""
    first, last = curve.iteration[0], curve.iteration[-1]
    said = f"lm loss {curve.loss[0]:.2f} at iteration {first}, {curve.loss[-1]:.2f} at iteration {last}"
    evaluated = np.flatnonzero(~np.isnan(curve.validation))
    if len(evaluated):
        place = evaluated[-1]
        said += f"; validation {curve.validation[place]:.2f} at {curve.iteration[place]}"
    if not curve.spikes:
        return said
    count = "1 spike" if len(curve.spikes) == 1 else f"{len(curve.spikes)} spikes"
    return f"{said}; {count}, the last at {curve.spikes[-1]}"


def _loss(axis: Any, curve: Curve, name: str, exports: Sequence[int]) -> None:
    window = max(len(curve.loss) // SMOOTHED, 1)
    axis.plot(
        curve.iteration, curve.loss, color=COLOURS[0], linewidth=0.9, alpha=0.35, label="each iteration"
    )
    mean = smooth(curve.loss, window)
    axis.plot(curve.iteration, mean, color=COLOURS[0], linewidth=1.8, label=f"mean of {window}")
    evaluated = ~np.isnan(curve.validation)
    if evaluated.any():
        axis.plot(
            curve.iteration[evaluated],
            curve.validation[evaluated],
            ".-",
            color=COLOURS[1],
            label="validation",
        )
    marked = [int(np.searchsorted(curve.iteration, step)) for step in exports]
    if marked:  # matplotlib finds no layout around points that are none
        points = curve.iteration[marked], mean[marked]
        axis.plot(*points, "o", color=INK, markersize=5, label="exported", clip_on=False)
    if curve.spikes:
        _spikes(axis, curve, name)
    axis.set_title(name, loc="left", fontsize=13, fontweight="bold", color=INK, pad=20)
    axis.text(0, 1.03, sentence(curve), transform=axis.transAxes, color=GREY)
    axis.set_ylabel("lm loss", color=GREY)
    axis.set_ylim(0, None)
    axis.legend(frameon=False, labelcolor=GREY)
    _along(axis, curve)


def _spikes(axis: Any, curve: Curve, name: str) -> None:
    """Mark the iterations whose loss jumped, the first of a row by its number; say how to see its samples."""
    jumped = ~np.isnan(curve.spike)
    steps, losses = curve.iteration[jumped], curve.loss[jumped]
    top = np.nanmax(np.where(np.isfinite(curve.loss), curve.loss, np.nan), initial=0.0)
    heights = np.where(np.isfinite(losses), losses, top)
    label = f"spike: plait trace {name} --step {steps[-1]}"
    axis.plot(steps, heights, "v", color=COLOURS[3], markersize=6, label=label, clip_on=False)
    first = ~np.isin(steps - 1, steps)
    for step, height in zip(steps[first], heights[first], strict=True):
        axis.annotate(
            str(step), (step, height), (6, 2), textcoords="offset points", color=COLOURS[3], fontsize=8
        )


def _small(axis: Any, curve: Curve, values: NDArray[np.float64], words: str, colour: str) -> None:
    axis.plot(curve.iteration, values, color=colour, linewidth=1.2)
    axis.set_title(words, loc="left", fontsize=9, color=INK)
    axis.set_ylim(0, None)
    axis.yaxis.set_major_formatter("{x:g}")
    _along(axis, curve)


def _along(axis: Any, curve: Curve) -> None:
    axis.set_xlabel("iteration", color=GREY)
    axis.set_xlim(min(0, curve.iteration[0]), max(curve.iteration[-1], 1))
    plain(axis)


def plain(axis: Any) -> None:
    """Let the curve of a matplotlib axis stand out: a light grid, thin grey axes, no frame."""
    axis.grid(color="#e4e8ec", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#8a949e")
    axis.tick_params(color="#8a949e", labelcolor="#56616d", width=0.6)
