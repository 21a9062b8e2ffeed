"""How long a run is and which iterations it saves: arithmetic of counts, nothing else.

>>> train_iters(instances=195_122, global_batch_size=128, epochs=1)
1525
>>> train_iters(instances=4_833, global_batch_size=32, epochs=5)
760
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from plait.errors import ConfigError, DataError
from plait.files import read_json

RANGE = re.compile(r"(\d+)-(\d+)")
LLAVA = ("llava", "llava_jp")
"""Recipes whose data energon reads."""


def train_iters(*, instances: int, global_batch_size: int, epochs: int, recipe: str = "chat") -> int:
    """Iterations of a run over ``instances`` packed sequences, as SOLO and CodeAct count them.

    Each epoch takes one iteration more than fit whole, so that none of its sequences is left out. LLaVA-JP,
    whose loader has no end, counts what fits whole.

    >>> train_iters(instances=1000, global_batch_size=256, epochs=2, recipe="llava_jp")
    6
    """
    whole = instances // global_batch_size
    return (max(whole, 1) if recipe in LLAVA else whole + 1) * epochs


def warmup_iters(run: Mapping[str, Any], train_iters: int, sequence: int) -> float:
    """Iterations of a run's warmup, which may be given as a share of the run or in tokens.

    Args:
        run: its ``lr_warmup_*`` keys and ``global_batch_size``.
        train_iters: the length of the run.
        sequence: tokens of a sequence, for a warmup in tokens.
    """
    if run["lr_warmup_fraction"] is not None:
        return float(run["lr_warmup_fraction"] * train_iters)
    if run["lr_warmup_tokens"] is not None:
        return float(run["lr_warmup_tokens"] / (run["global_batch_size"] * sequence))
    return float(run["lr_warmup_iters"])


def check_warmup(run: Mapping[str, Any], train_iters: int, sequence: int) -> None:
    """Refuse a warmup that leaves nothing to decay over: Megatron's schedule needs it shorter.

    Raises:
        ValueError: it has both lengths.
    """
    warmup, decay = warmup_iters(run, train_iters, sequence), run["lr_decay_iters"] or train_iters
    if warmup >= decay:
        whole = "lr_decay_iters" if run["lr_decay_iters"] else "the run"
        raise ValueError(f"the warmup of {warmup:g} iterations is not shorter than {whole}, {decay}")


def skipped(texts: Iterable[str]) -> tuple[range, ...]:
    """Ranges of iterations, sorted, those that touch or overlap merged; both ends of ``a-b`` are skipped.

    >>> skipped(["300-400", "100-110", "105-120", "121-122"])
    (range(100, 123), range(300, 401))

    Raises:
        ValueError: a text is no range of iterations, which count from 1.
    """
    ranges: list[range] = []
    for first, last in sorted(map(_ends, texts)):
        if ranges and first <= ranges[-1].stop:
            ranges[-1] = range(ranges[-1].start, max(ranges[-1].stop, last + 1))
        else:
            ranges.append(range(first, last + 1))
    return tuple(ranges)


def _ends(text: str) -> tuple[int, int]:
    found = RANGE.fullmatch(text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < first <= last:
        raise ValueError(f"{text!r} is no range of iterations; expected first-last, e.g. 100-110")
    return first, last


@dataclass(frozen=True)
class Schedule:
    """Iterations in all, and between two persistent checkpoints."""

    train_iters: int
    save_interval: int

    @classmethod
    def read(cls, path: Path | str, settings: Mapping[str, Any] | None = None) -> Self | None:
        """Read data/ckpts/{run}/schedule.json; None if it was made with other settings than these.

        Raises:
            DataError: it is missing, or is not a schedule.
        """
        found = read_json(path)
        if settings is not None and found.get("settings", settings) != settings:
            return None
        try:
            return cls(train_iters=int(found["train_iters"]), save_interval=int(found["save_interval"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a schedule: {error!r}", hint="remove it; it is remade") from error

    @classmethod
    def of(cls, run: Mapping[str, Any], instances: int | None, *, sequence: int = 0) -> Self | None:
        """The schedule of a run over ``instances`` packed sequences; None where it waits for them.

        Args:
            run: ``recipe``, ``epochs``, ``train_iters`` or ``train_tokens``, ``save_interval`` and
                ``global_batch_size``.
            instances: packed sequences in its mixture, where they are known.
            sequence: tokens of one, where they are known.
        """
        if run["train_iters"] is not None:
            return cls(train_iters=run["train_iters"], save_interval=run["save_interval"])
        if run["train_tokens"] is not None:
            tokens = run["global_batch_size"] * sequence
            return cls(-(-run["train_tokens"] // tokens), run["save_interval"]) if tokens else None
        if instances is None:
            return None
        epoch = train_iters(
            instances=instances,
            global_batch_size=run["global_batch_size"],
            epochs=1,
            recipe=run["recipe"],
        )
        return cls(train_iters=epoch * run["epochs"], save_interval=run["save_interval"] or epoch)

    def check(self, step: int, *, run: str) -> None:
        """Refuse an iteration that is never saved.

        Raises:
            ConfigError: it names the legal iterations.
        """
        if not self.saves(step):
            raise ConfigError(f"iteration {step} of run {run} is never saved: {self.describe(step)}")

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is kept at this iteration."""
        return 0 < step <= self.train_iters and (step % self.save_interval == 0 or step == self.train_iters)

    def previous(self, step: int) -> int:
        """The saved iteration before this one; 0 is the start."""
        return (step - 1) // self.save_interval * self.save_interval

    def together(self, step: int, saves: int) -> int:
        """The number of the job that saves an iteration, of jobs that write so many checkpoints each."""
        return (-(-step // self.save_interval) - 1) // saves

    def steps(self) -> list[int]:
        """Every saved iteration."""
        return [*range(self.save_interval, self.train_iters, self.save_interval), self.train_iters]

    def describe(self, step: int) -> str:
        """The legal iterations in words, and the nearest to ``step``."""
        steps = self.steps()
        nearest = sorted(sorted(steps, key=lambda legal: abs(legal - step))[:2])
        some = steps if len(steps) <= 12 else [*steps[:3], "...", steps[-2], steps[-1]]
        return (
            f"it saves every {self.save_interval} iterations and its final one "
            f"({', '.join(map(str, some))}); nearest: {' or '.join(map(str, nearest))}"
        )

    def to_json(self) -> dict[str, Any]:
        """The file data/ckpts/{run}/schedule.json."""
        return {"train_iters": self.train_iters, "save_interval": self.save_interval}
