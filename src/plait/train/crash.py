"""States against a crash: what a checkpoint holds, between two checkpoints, in no stage's outputs.

They lie in ``data/ckpts/{run}/.state/iter_NNNNNNN``. The newest two are kept; the next persistent checkpoint
takes their place. Rank 0 does all of this, while it holds the run's lease.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.errors import DataError
from plait.train.job import Job

KEPT = 2
PATTERN = "iter_" + "[0-9]" * 7
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class States:
    """The states of a job's run."""

    job: Job

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return Path(self.job.run.states)

    def path(self, iteration: int) -> Path:
        """The state of an iteration."""
        return self.folder / f"iter_{iteration:07d}"

    def newest(self) -> int:
        """The iteration of the newest state that this job may go on from; 0 if there is none.

        Others are named and left aside; what a killed job left half written is removed.
        """
        for part in self.folder.glob(".*.part"):
            files.remove(part)
        for state in sorted(self._all(), reverse=True):
            unfit = self._unfit(state)
            if not unfit:
                log.warning("%s: training goes on from it", state)
                return _iteration(state)
            log.warning("%s is left aside: %s", state, unfit)
        return 0

    def _all(self) -> Iterator[Path]:
        return self.folder.glob(PATTERN)

    def _unfit(self, state: Path) -> str:
        """Why the job cannot go on from a state; "" if it can."""
        start, stop = self.job.steps
        if not start < _iteration(state) <= stop:
            return f"this job trains from iteration {start} to {stop}"
        try:
            manifest = files.read_manifest(state, kind="state")
            changed = self._changed(manifest)
            if not changed:
                files.check_manifest(state)
        except (DataError, OSError) as error:
            return f"it is damaged: {error}"
        return changed

    def _changed(self, manifest: dict[str, Any]) -> str:
        job = self.job
        for path in (job.start, job.analysis):
            was, now = manifest["inputs"].get(path, "absent"), files.digest_of_input(path)
            if was != now:
                return f"{path} was {was[:12]} when it was saved and is {now[:12]} now"
        was, now = manifest["settings"], json.loads(json.dumps(job.settings))
        keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
        if keys:
            key = keys[0]
            return f"{key} was {was.get(key)!r} when it was saved and is {now.get(key)!r} now"
        if manifest["facts"]["train_iters"] != job.train_iters:
            return f"the run had {manifest['facts']['train_iters']} iterations, it has {job.train_iters} now"
        return ""

    def prune(self) -> None:
        """Keep the newest, by the time they were written."""
        written = sorted(self._all(), key=lambda state: (state / layout.MANIFEST).stat().st_mtime_ns)
        for state in written[:-KEPT]:
            files.remove(state)

    def clear(self) -> None:
        """A persistent checkpoint stands: what was kept against its loss goes."""
        _, stop = self.job.steps
        for state in list(self._all()):
            if _iteration(state) <= stop:
                files.remove(state)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _iteration(state: Path) -> int:
    return int(state.name.removeprefix("iter_"))
