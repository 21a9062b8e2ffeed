"""Charts as SVG text, coloured by the style sheet of their page; equal figures give equal text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 42, 18, 20, 40
STEPS = (1, 2, 2.5, 5, 10)
LONG_TAIL = 30
"""From so many times the lower bound on, an axis is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """Values along ``size`` pixels from ``low`` to ``high``."""

    low: float
    high: float
    size: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Pixels from the axis' start."""
        if not self.logarithmic:
            return self.size * (value - self.low) / (self.high - self.low)
        ratio = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.size * ratio

    def ticks(self, most: int = 5) -> list[float]:
        """Round values along it, at most so many and one more; whole ones beyond 1."""
        if not self.logarithmic:
            step = nice((self.high - self.low) / most)
            step = max(step, 1) if self.high > 1 else step
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.ceil(math.log2(self.low) - 1e-9), math.floor(math.log2(self.high) + 1e-9) + 1)
        return [2.0**power for power in powers[:: -(-len(powers) // most)]]


def nice(value: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below a value.

    >>> [nice(value) for value in (0.3, 1, 21, 260)]
    [0.5, 1.0, 25.0, 500.0]
    """
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in STEPS if step * power >= value * (1 - 1e-9))


def short(value: float) -> str:
    """A number as a tick has it.

    >>> [short(value) for value in (0.5, 12, 32_768, 2_500_000)]
    ['0.5', '12', '32.8k', '2.5M']
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def axis_of(values: Sequence[float], size: float) -> Axis:
    """From 0 on for values that are near one another, else logarithmic from the least."""
    high = max(*values, 1)
    low = max(min(values), 1)
    middle = sorted(values)[len(values) // 2]
    if high / low >= LONG_TAIL and high >= LONG_TAIL / 3 * max(middle, 1):
        return Axis(low, high * 1.1, size, logarithmic=True)
    return Axis(0, max(high, 2) * 1.03, size)


def curves(words: str, quantiles: Mapping[str, Sequence[float]], classes: Mapping[str, str]) -> str:
    """Empirical distribution functions of several sources in one chart.

    Args:
        words: what is measured.
        quantiles: by source, values at equally spaced shares from 0 to 1.
        classes: by source, the class that colours it.
    """
    along = axis_of([value for several in quantiles.values() for value in several], WIDTH - LEFT - RIGHT)
    upwards = Axis(0, 1, HEIGHT - TOP - BOTTOM)
    drawn = [
        f'<path class="line {classes[name]}" d="{_stairs(values, along, upwards)}">'
        f"<title>{escape(name)}: half have at most {short(values[len(values) // 2])}</title></path>"
        for name, values in quantiles.items()
    ]
    shares = [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
    return _chart(f"Share with at most so many {words}", words, along, upwards, shares, drawn)


def bars(
    words: str,
    edges: Sequence[float],
    counts: Sequence[int],
    class_: str,
    *,
    of: str = "sequences",
    percent: bool = False,
) -> str:
    """A histogram; bounds far apart at its end are drawn on a logarithmic axis.

    Args:
        words: what is measured.
        edges: bounds of the bars, one more than they are.
        counts: how many fall between each two of them.
        class_: the class that colours it.
        of: what is counted.
        percent: whether the bounds are shares.
    """
    long = edges[-1] - edges[-2] > 2 * (edges[1] - edges[0])
    along = Axis(edges[0], edges[-1], WIDTH - LEFT - RIGHT, logarithmic=long)
    upwards = Axis(0, max(*counts, 1), HEIGHT - TOP - BOTTOM)
    bottom = HEIGHT - BOTTOM
    drawn = []
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        if not count:
            continue
        left, right = LEFT + along(low), LEFT + along(high)
        tall = max(upwards(count), 1)
        between = f"{low:.0%} to {high:.0%}" if percent else f"{low:,.0f} to {high:,.0f}"
        drawn.append(
            f'<rect class="area {class_}" x="{left:.1f}" y="{bottom - tall:.1f}" '
            f'width="{max(right - left - 0.6, 0.6):.1f}" height="{tall:.1f}">'
            f"<title>{between}: {count:,}</title></rect>"
        )
    marks = [(tick, short(tick)) for tick in upwards.ticks(4) if tick == int(tick)]
    drawn.append(f'<text x="{LEFT}" y="11">{escape(of)}</text>')
    return _chart(
        f"How many {of} have so much: {words}", words, along, upwards, marks, drawn, percent=percent
    )


def _stairs(values: Sequence[float], along: Axis, upwards: Axis) -> str:
    """A path that rises at each value."""
    bottom, steps = HEIGHT - BOTTOM, len(values) - 1
    path = [f"M{LEFT + along(values[0]):.1f} {bottom}"]
    for number, value in enumerate(values):
        path.append(f"H{LEFT + along(value):.1f}V{bottom - upwards(number / steps):.1f}")
    return "".join(path) + f"H{WIDTH - RIGHT}"


def _chart(
    title: str,
    words: str,
    along: Axis,
    upwards: Axis,
    marks: Sequence[tuple[float, str]],
    drawn: Sequence[str],
    *,
    percent: bool = False,
) -> str:
    """Axes, their marks and words, and what is drawn between them."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    grid = [
        f'<path class="grid" d="M{LEFT} {bottom - upwards(at):.1f}H{right}"/>'
        f'<text x="{LEFT - 6}" y="{bottom - upwards(at) + 3.5:.1f}" text-anchor="end">{text}</text>'
        for at, text in marks
    ]
    ticks = [
        f'<path class="grid" d="M{LEFT + along(at):.1f} {bottom}v4"/>'
        f'<text x="{LEFT + along(at):.1f}" y="{bottom + 15}" text-anchor="middle">'
        f"{f'{at:.0%}' if percent else short(at)}</text>"
        for at in along.ticks()
    ]
    below = f"{words} (logarithmic)" if along.logarithmic else words
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(grid)}{''.join(ticks)}{''.join(drawn)}"
        f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>'
        f'<text class="words" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(below)}</text></svg>"
    )
