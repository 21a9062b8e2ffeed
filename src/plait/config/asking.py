"""What one plan asks of each run: collected while Snakemake builds its graph, told to training jobs."""

import json
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from plait import layout
from plait.config import room
from plait.config.plan import Plan
from plait.config.run import Asked
from plait.files import canonical

ASKED = "PLAIT_ASKED"
"""Where a plan tells the jobs of a cluster, which plan again, what it asks for."""


@dataclass
class Asking:
    """Iterations and exports that are asked for, by run.

    Attributes:
        plan: the config.
        steps: iterations that are asked for.
        exports: those that are asked for as exports, besides those of config/.
        say: is told once a run what its checkpoints take on a disk.
        tells: environment of this plan's jobs, which is told what is asked for.
        told: runs of which it was said.
    """

    plan: Plan
    say: Callable[[str], None] = lambda _: None
    tells: MutableMapping[str, str] = field(default_factory=dict)
    steps: dict[str, set[int]] = field(default_factory=dict)
    exports: dict[str, set[int]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def add(self, artifact: layout.Iteration | layout.Export) -> None:
        """An iteration or an export is asked for."""
        if isinstance(artifact, layout.Iteration):
            self.steps.setdefault(artifact.run, set()).add(artifact.iteration)
        else:
            self.exports.setdefault(artifact.run, set()).add(artifact.step)

    def around(self, iteration: layout.Iteration) -> dict[str, Any]:
        """What the job of an iteration is told besides its run's settings."""
        run = iteration.run
        stay = self.of(run, since=iteration.iteration)
        if run not in self.told:
            self.told.add(run)
            self.say(room.said(self.plan, run, self.steps.get(run, {iteration.iteration}), **stay))
        self.tells[ASKED] = self.to_json()
        asked = Asked(until=self.until(iteration), **stay).model_dump(mode="json")
        return {**self.plan.around(run), "asked": asked}

    def until(self, iteration: layout.Iteration) -> int:
        """The last iteration that the job of this one saves, of those asked for (``saves_per_job``).

        The first job of several does them all; the others find them done.
        """
        run, step = iteration.run, iteration.iteration
        saves, schedule = self.plan.run(run).saves_per_job, self.plan.schedule_as_known(run)
        if saves == 1 or schedule is None:
            return step
        number = schedule.together(step, saves)
        others = (one for one in self.steps.get(run, ()) if schedule.together(one, saves) == number)
        return max([step, *others])

    def of(self, name: str, *, since: int) -> dict[str, tuple[int, ...]]:
        """Iterations of a run that stay: to be exported, or those that another run begins with.

        Args:
            name: the run.
            since: the iteration that is trained; those from there on are exported anew.
        """
        runs = [
            one for one in self.plan.config.runs.values() if one.start_run == name and one.start_iteration
        ]
        exports = {*self.exports.get(name, ()), *self.plan.run(name).exports}
        to_export = {
            step
            for step in exports
            if step >= since or not self.plan.stands(layout.Export(run=name, step=step))
        }
        starts = {int(one.start_iteration or 0) for one in runs if one.finetune}
        resumed = {int(one.start_iteration or 0) for one in runs if not one.finetune}
        return {"wanted": tuple(sorted(to_export | starts)), "resumed": tuple(sorted(resumed))}

    def to_json(self) -> str:
        """What is asked for, for a job that plans again on a cluster and sees only what it is made from."""
        parts = {"steps": self.steps, "exports": self.exports}
        return canonical(
            {key: {run: sorted(one) for run, one in part.items()} for key, part in parts.items()}
        )

    def take(self, text: str) -> None:
        """Ask for what :meth:`to_json` wrote."""
        for key, runs in json.loads(text).items():
            for run, steps in runs.items():
                getattr(self, key).setdefault(run, set()).update(steps)
