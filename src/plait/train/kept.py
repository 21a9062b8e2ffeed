"""What a job keeps before its checkpoint is published: states against a crash, and checkpoints that wait.

States lie in ``data/ckpts/{run}/.state/iter_NNNNNNN``. The newest two are kept; the next checkpoint takes
their place. A job that writes several checkpoints (``saves_per_job``) puts them whole, with the manifests
that they will have, in ``data/ckpts/{run}/.saved``: the job of each moves it into place. Nothing here is an
output of a rule, so no failure takes it away. Rank 0 does all of this, while it holds the run's lease.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.config.disk import Thinning
from plait.errors import CheckpointError, DataError
from plait.train.job import Job

KEPT = 2
PATTERN = "iter_" + "[0-9]" * 7
PART = ".iter_*.part"
"""What is written, or removed, by half."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What is kept of a job's run."""

    job: Job

    @property
    def folder(self) -> Path:
        """Where states lie."""
        return Path(self.job.run.states)

    @property
    def waiting(self) -> Path:
        """Where checkpoints wait for their jobs."""
        return Path(self.job.run.saved)

    def path(self, iteration: int) -> Path:
        """Where an iteration is kept: where the run saves it, as a checkpoint that waits."""
        where = self.waiting if iteration in self.saves else self.folder
        return where / Path(str(layout.Iteration(run=self.job.run.run, iteration=iteration))).name

    @cached_property
    def saves(self) -> tuple[int, ...]:
        """The iterations that this job saves as checkpoints, its last included."""
        start, stop = self.job.steps
        return tuple(step for step in self.job.saved.steps() if start < step <= stop)

    def inputs(self, iteration: int) -> dict[str, str]:
        """What an iteration is made from, by path and digest: the one saved before it, or the job's start."""
        job, before = self.job, self._before(iteration)
        found = {path: files.digest_of_input(path) for path in (job.start, job.analysis, job.schedule)}
        if before:
            del found[job.start]
            name = str(layout.Iteration(run=job.run.run, iteration=before))
            found[name] = files.digest_of_input(self.path(before))
        return found

    def _before(self, iteration: int) -> int:
        """The iteration saved by this job that one is trained from; 0 where it is the job's start."""
        return max((step for step in self.saves if step < iteration), default=0)

    def newest(self) -> int:
        """The iteration of the newest that this job may go on from; 0 if there is none.

        Others are named and left aside; what a killed job left half written is removed.
        """
        self._sweep()
        for kept in sorted(self._all(), key=_iteration, reverse=True):
            unfit = self._unfit(kept)
            if not unfit:
                log.warning("%s: training goes on from it", kept)
                return _iteration(kept)
            log.warning("%s is left aside: %s", kept, unfit)
        return 0

    def _sweep(self) -> None:
        """Remove what killed jobs have written or removed by half."""
        for folder in (self.folder, self.waiting, Path(str(self.job.run))):
            for part in folder.glob(PART):
                files.remove(part)

    def _end_without_optimizer(self, target: Path) -> None:
        """With `save_optim: none` nothing goes on from the run's final checkpoint, but another run."""
        job, last = self.job, _iteration(target)
        if (
            job.around["save_optim"] == "none"
            and last == job.train_iters
            and last not in job.asked["resumed"]
        ):
            names = [path.name for path in target.glob(layout.OPTIMIZER_FILES)]
            files.prune(target, names, "save_optim: none")

    def _all(self) -> Iterator[Path]:
        yield from self.folder.glob(PATTERN)
        yield from self.waiting.glob(PATTERN)

    def _unfit(self, kept: Path) -> str:
        """Why the job cannot go on from a state or a checkpoint; "" if it can."""
        (start, stop), iteration = self.job.steps, _iteration(kept)
        if not start < iteration <= stop:
            return f"this job trains from iteration {start} to {stop}"
        if kept != self.path(iteration):
            return (
                f"iteration {iteration} is {'a' if iteration in self.saves else 'no'} checkpoint of the run"
            )
        before = self._before(iteration)
        if before and not self.path(before).is_dir():
            return f"iteration {before}, which it was trained from, does not wait here any more"
        try:
            manifest = files.read_manifest(kept, kind="iteration" if iteration in self.saves else "state")
            changed = self._changed(manifest, iteration)
            if not changed:
                files.check_manifest(kept)
        except (DataError, OSError) as error:
            return f"it is damaged: {error}"
        return changed

    def _changed(self, manifest: dict[str, Any], iteration: int) -> str:
        job = self.job
        for path, now in self.inputs(iteration).items():
            was = manifest["inputs"].get(path, "absent")
            # A checkpoint is published as it is; of a state the run's length is enough.
            if was != now and (path != job.schedule or iteration in self.saves):
                return f"{path} was {was[:12]} when it was saved and is {now[:12]} now"
        was, now = manifest["settings"], json.loads(json.dumps(job.settings))
        keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
        if keys:
            key = keys[0]
            return f"{key} was {was.get(key)!r} when it was saved and is {now.get(key)!r} now"
        length = manifest["facts"].get("train_iters", job.train_iters)
        if length != job.train_iters:
            return f"the run had {length} iterations, it has {job.train_iters} now"
        return ""

    def prune(self) -> None:
        """Keep the newest states, by the time they were written."""
        written = sorted(
            self.folder.glob(PATTERN), key=lambda one: (one / layout.MANIFEST).stat().st_mtime_ns
        )
        for state in written[:-KEPT]:
            files.drop(state)

    def thin_out(self) -> None:
        """Remove of checkpoints before the job's start what the run's keys say; their manifests stay.

        The start itself stays: whatever becomes of this job and its checkpoints, another can begin there.
        """
        job = self.job
        found = {step: folder for step, folder in self._published() if step <= job.steps[0]}
        if not found:
            return
        rule = Thinning.of(
            job.around, job.train_iters, wanted=job.asked["wanted"], resumed=job.asked["resumed"]
        )
        whole, able = rule.weights(found), rule.optimizers(found)
        for step, folder in found.items():
            optimizer = [path.name for path in folder.glob(layout.OPTIMIZER_FILES)]
            if step not in whole:
                weights = [path.name for path in folder.glob(layout.WEIGHT_FILES)]
                files.prune(folder, optimizer + weights, f"keep: {rule.keep}")
            elif step not in able:
                files.prune(folder, optimizer, f"save_optim: {rule.save_optim}")

    def _published(self) -> Iterator[tuple[int, Path]]:
        """The run's whole checkpoints; none that was adopted."""
        for folder in Path(str(self.job.run)).glob(PATTERN):
            if (folder / layout.MANIFEST).is_file() and files.made_by_plait(folder):
                yield _iteration(folder), folder

    def is_done(self) -> bool:
        """Whether the job has only to publish: what it is asked for waits, nothing is left to train."""
        ends = {layout.Iteration.parse(self.job.target).iteration, self.job.steps[1]}
        return all(self.path(step).is_dir() and not self._unfit(self.path(step)) for step in ends)

    def publish(self) -> None:
        """Put the job's checkpoint into place, and remove the states that it makes needless.

        Its files have two names, here and there, until all is done: Snakemake takes the manifest of a killed
        job's target away, and the same job asked again then begins this anew.

        Raises:
            CheckpointError: nothing was saved for it.
            LayoutError: something that plait did not make stands there by now; what was saved waits.
        """
        files.refuse_foreign(layout.Iteration.parse(self.job.target))
        target = Path(self.job.target)
        kept = self.path(_iteration(target))
        if not kept.is_dir():
            raise CheckpointError(f"{target} was not saved", hint="ask for it again")
        self._sweep()
        files.drop(target)
        part = shutil.copytree(kept, _part_of(target), symlinks=True, copy_function=os.link)
        files.sync(part)
        part.rename(target)
        files.sync(target.parent, deep=False)
        with files.appears_whole(target.parent / layout.TRACKER) as tracker:
            tracker.write_text(str(_iteration(target)))
        self._end_without_optimizer(target)
        for left in sorted(self._all(), key=_iteration):
            if _iteration(left) <= _iteration(target):
                files.drop(left)
        for folder in (self.folder, self.waiting):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _part_of(folder: Path) -> Path:
    """What a folder is called while it is there by half."""
    return folder.with_name(f".{folder.name}.part")


def _iteration(kept: Path) -> int:
    return int(kept.name.removeprefix("iter_"))
