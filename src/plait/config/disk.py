"""Which checkpoints of a run are thinned out, and what those that stand take on a disk: arithmetic only.

A checkpoint is weights, and an optimizer's state of several times their size. ``keep`` and ``save_optim`` of
a run say what goes: each job thins out the checkpoints before the one that it starts from.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

KEEP = re.compile(r"all|(last|every) [1-9]\d*")
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight."""
MOMENTS = {"adam": 8, "sgd": 4}
"""Bytes of an optimizer's fp32 moments of a weight."""
MASTER = 4
"""Bytes of the fp32 master of a weight that is narrower."""


@dataclass(frozen=True)
class Thinning:
    """What of a run's checkpoints goes.

    Attributes:
        keep: whose weights stay: ``all``, those of the ``last N``, or of ``every K`` iterations.
        save_optim: which optimizers stay: ``all``, the ``last``, or ``none`` once the run is complete.
        length: iterations of the run; its last checkpoint stays.
        wanted: iterations whose weights are still asked for.
        resumed: iterations that another run goes on from, with the optimizer.
    """

    keep: str
    save_optim: str
    length: int
    wanted: Collection[int] = ()
    resumed: Collection[int] = ()

    @classmethod
    def of(cls, run: Mapping[str, Any], length: int, **asked: Collection[int]) -> Self:
        """What the keys of a run say."""
        return cls(run["keep"], run["save_optim"], length, **asked)

    def weights(self, steps: Collection[int]) -> set[int]:
        """Those of saved iterations whose weights stay; the newest is always one."""
        kind, _, text = self.keep.partition(" ")
        number = int(text or 1)
        stay = {
            "all": lambda: set(steps),
            "last": lambda: set(sorted(steps)[-number:]),
            "every": lambda: {step for step in steps if step % number == 0},
        }[kind]()
        always = {max(steps), self.length, *self.wanted, *self.resumed}
        return stay | (always & set(steps))

    def optimizers(self, steps: Collection[int]) -> set[int]:
        """Those of saved iterations that can be trained on from; the newest is one until the run is over."""
        newest = max(steps)
        stay = self.weights(steps) if self.save_optim == "all" else {newest, *self.resumed} & set(steps)
        return stay - ({self.length} - set(self.resumed) if self.save_optim == "none" else set())

    def peak(self, steps: Collection[int], *, weights: float, optimizer: float, together: int = 1) -> float:
        """What checkpoints take at most: a job thins out those before its start, and writes whole ones.

        Args:
            steps: their iterations.
            weights: what the weights of one take.
            optimizer: what its optimizer takes.
            together: checkpoints of a job.
        """
        most, standing, whole = 0.0, set[int](), set[int]()
        ordered = sorted(steps)
        for first in range(0, len(ordered), together):
            if standing:
                standing, whole = self.weights(standing), self.optimizers(standing) & whole
            standing, whole = (found | {*ordered[first : first + together]} for found in (standing, whole))
            most = max(most, len(standing) * weights + len(whole) * optimizer)
        return most


def sizes(run: Mapping[str, Any], parameters: float, *, trained: float | None = None) -> tuple[float, float]:
    """Bytes of a checkpoint's weights and of its optimizer, which has a state of what is trained only.

    Args:
        run: its keys.
        parameters: of the model.
        trained: those that are not frozen; all, if it is not given.
    """
    width = WIDTH[run["params_dtype"]]
    master = MASTER if width < MASTER else 0
    moved = parameters if trained is None else trained
    return parameters * width, moved * (MOMENTS[run["optimizer"]] + master)
