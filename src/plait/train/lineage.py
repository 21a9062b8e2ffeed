"""Which samples each iteration of a run saw: each copy of the model writes its own, `plait trace` reads all.

``data/ckpts/{run}/samples/dp_000.jsonl`` has a row an iteration, written before its loss is summed up::

    {"iteration": 3, "micro_batch_size": 1, "copy": 0, "copies": 2, "samples": [[0, 17], [0, 4]]}

A packed sample is the number of its source in the mixture and the number of the pack; one of energon's is its
tar and the key in it, as one path. ``job.json`` beside it says which mixture that is.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait import files
from plait.errors import DataError
from plait.layout import SAMPLES
from plait.tokens.lineage import Lineage
from plait.train.rows import Rows, numbered

if TYPE_CHECKING:
    from plait.train.job import Job

JOB = "job.json"
PATTERN = "dp_*.jsonl"
FIRST = "dp_000.jsonl"


def begin(job: "Job") -> None:
    """Say what the samples of a run are drawn from; rows over another mixture are of no use and go.

    One process of the job calls it, before any copy of the model opens its log.
    """
    folder = Path(job.run.samples)
    digest = files.digest_of_input(job.analysis)
    if (folder / JOB).is_file() and files.read_json(folder / JOB)["digest"] != digest:
        files.remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = {"analysis": job.analysis, "digest": digest, "settings": job.settings}
    with files.appears_whole(folder / JOB) as part:
        files.write_json(part, said)


class SampleLog(Rows):
    """What one copy of the model saw; the first also drops what copies left that the run has no more."""

    def __init__(self, run: Path, *, start: int, stop: int, micro: int, copy: int, copies: int) -> None:
        """Open the log to go on after iteration ``start``."""
        super().__init__(run / SAMPLES / f"dp_{copy:03d}.jsonl", start=start, stop=stop)
        self.place = {"micro_batch_size": micro, "copy": copy, "copies": copies}
        if copy == 0:
            for path in self.path.parent.glob(PATTERN):
                if int(path.stem.removeprefix("dp_")) >= copies:
                    Rows(path, start=start, stop=stop)

    def note(self, iteration: int, samples: Sequence[Any], *, skipped: bool = False) -> None:
        """Keep the samples of an iteration, in the order in which this copy saw them."""
        more = {"skipped": True} if skipped else {}
        self.write({"iteration": iteration, **self.place, **more, "samples": [*samples]})


@dataclass(frozen=True)
class Step:
    """The samples of an iteration by their number in the global batch."""

    samples: dict[int, Any]
    total: int
    skipped: bool = False
    """Whether the iteration was left out: its samples trained nothing."""


def of_step(folder: Path, iteration: int) -> Step | None:
    """What the logs of all copies say of an iteration; None where they say nothing."""
    rows = [row for path in sorted(folder.glob(PATTERN)) for row in _rows(path, iteration)]
    if not rows:
        return None
    samples = {number: sample for row in rows for number, sample in _numbered(row)}
    total = max(row["copies"] * len(row["samples"]) for row in rows)
    return Step(dict(sorted(samples.items())), total, any("skipped" in row for row in rows))


def last_step(folder: Path) -> int:
    """The last iteration that the first copy has noted; 0 if none."""
    return max((step for step, _ in numbered(folder / FIRST)), default=0)


def _rows(path: Path, iteration: int) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for step, line in numbered(path) if step == iteration)


def _numbered(row: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """The samples of a copy, each with its number in the global batch: copies take micro-batches in turn."""
    micro, copy, copies = row["micro_batch_size"], row["copy"], row["copies"]
    for nth, sample in enumerate(row["samples"]):
        batch, place = divmod(nth, micro)
        yield (batch * copies + copy) * micro + place, sample


def sources(folder: Path) -> list[Path]:
    """The packed shards that the numbers in a run's log stand for; none where the log does not say."""
    from plait.train.job import Mixed

    if not (folder / JOB).is_file():
        return []
    mixture = Mixed(Path(files.read_json(folder / JOB)["analysis"]))
    return [shard for shard, _ in mixture.shards]


def lines_of(samples: Sequence[Any], shards: Sequence[Path]) -> list[list[str]]:
    """For each packed sample the raw lines of its documents; none where its shard does not say."""
    packed = [sample for sample in samples if not isinstance(sample, str)]
    return [_packed_lines(shards[source], pack) for source, pack in packed] if shards else []


def _packed_lines(shard: Path, pack: int) -> list[str]:
    with suppress(DataError):
        return [str(one) for one in Lineage(shard)[pack]]
    return []
