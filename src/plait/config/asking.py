"""What one plan asks of each run: collected while Snakemake builds its graph, told to training jobs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait import layout
from plait.config import room
from plait.config.plan import Plan
from plait.config.run import Asked


@dataclass
class Asking:
    """Iterations and exports that are asked for, by run.

    Attributes:
        plan: the config.
        steps: iterations that are asked for.
        exports: those that are asked for as exports, besides those of config/.
        say: is told once a run what its checkpoints take on a disk.
        told: runs of which it was said.
    """

    plan: Plan
    say: Callable[[str], None] = lambda _: None
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
        stay = self.of(run)
        if run not in self.told:
            self.told.add(run)
            self.say(room.said(self.plan, run, self.steps.get(run, {iteration.iteration}), **stay))
        asked = Asked(until=self.until(iteration), **stay).model_dump(mode="json")
        return {**self.plan.around(run), "asked": asked}

    def until(self, iteration: layout.Iteration) -> int:
        """The last iteration that the job of this one saves, of those asked for; 0 if another job does it.

        The first job of several that one can do (``saves_per_job``) does them; the others find it done.
        """
        run, step = iteration.run, iteration.iteration
        saves, schedule = self.plan.run(run).saves_per_job, self.plan.schedule_as_known(run)
        if saves == 1 or schedule is None:
            return step
        before = layout.Iteration(run=run, iteration=schedule.previous(step) or step)
        number = schedule.together(step, saves)
        begins = schedule.together(before.iteration, saves) != number or before == iteration
        if not begins and not Path(before.manifest).is_file():
            return 0
        others = (one for one in self.steps.get(run, ()) if schedule.together(one, saves) == number)
        return max(step, *others)

    def of(self, name: str) -> dict[str, tuple[int, ...]]:
        """Iterations of a run that stay: to be exported, or those that another run begins with."""
        runs = [
            one for one in self.plan.config.runs.values() if one.start_run == name and one.start_iteration
        ]
        exports = {*self.exports.get(name, ()), *self.plan.run(name).exports}
        missing = {
            step for step in exports if not Path(layout.Export(run=name, step=step).manifest).is_file()
        }
        starts = {int(one.start_iteration or 0) for one in runs if one.finetune}
        resumed = {int(one.start_iteration or 0) for one in runs if not one.finetune}
        return {"wanted": tuple(sorted(missing | starts)), "resumed": tuple(sorted(resumed))}
