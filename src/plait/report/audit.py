"""The mixture that a run consumed, from its log of samples, beside the one that was planned.

Each sample counts once, however many copies of the model there were and however often the run was resumed:
its log has each iteration once. Packed steps that the log lacks are computed from seed and step, as `plait
trace` does. A step that ``skip_train_iteration_range`` leaves out is consumed and not trained; both count.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait import files, layout
from plait.errors import DataError
from plait.report import state, told
from plait.train import lineage
from plait.train.job import Mixed
from plait.train.rows import numbered

FILE = "audit.json"

Counts = NDArray[np.int64]
"""Sequences of each step and each dataset."""


def audit(name: str) -> dict[str, Any]:
    """Compare what a run consumed with the weights of its mixture, and keep it beside the run.

    Args:
        name: the run.

    Returns:
        ``run``, ``steps`` (the first and the last that are counted), ``missing`` (how many of them nothing
        tells of), ``consumed`` and ``trained`` (sequences), ``datasets`` (of each its ``planned`` share of
        the sequences, and of those consumed and trained the number, the share and how far that is from
        the planned one) and ``largest``: the dataset whose trained share is farthest, and by how much.

    Raises:
        DataError: there is no such run, nothing of it is known, or its data are gone or others now.
    """
    (run,) = state.runs(name)
    said = told.of(run)
    told.check_unchanged(said["analysis"], said["digest"], "the run")
    planned = _planned(Path(said["analysis"]))
    first, last = _steps(run, said)
    counts = _counts(run, said, [*planned], range(first, last + 1))
    missing = int((counts.sum(axis=1) == 0).sum())
    left_out = np.array([told.is_left_out(said["settings"], step) for step in range(first, last + 1)], bool)
    sums = {"consumed": counts.sum(axis=0), "trained": counts[~left_out].sum(axis=0)}
    if not sums["consumed"].sum():
        raise DataError(f"nothing tells what {run} consumed", hint="its log of samples is gone")
    datasets = {
        dataset: {"planned": share, **_realised(share, {key: each[n] for key, each in sums.items()}, sums)}
        for n, (dataset, share) in enumerate(planned.items())
    }
    found = {
        "run": name,
        "steps": [first, last],
        "missing": missing,
        **{key: int(each.sum()) for key, each in sums.items()},
        "datasets": datasets,
        "largest": _largest(datasets),
    }
    with files.appears_whole(Path(str(run)) / FILE) as part:
        files.write_json(part, found)
    return found


def in_words(found: Mapping[str, Any]) -> Iterator[str]:
    """The audit, for a reader."""
    first, last = found["steps"]
    skipped = found["consumed"] - found["trained"]
    beside = f", {skipped} consumed and left out by skip_train_iteration_range" if skipped else ""
    lost = f"; nothing tells of {found['missing']} of the steps" if found["missing"] else ""
    yield f"{found['run']}, steps {first} to {last}: {found['trained']} sequences trained{beside}{lost}"
    for name, one in found["datasets"].items():
        yield (
            f"{name}: planned {one['planned']:.4f}, trained {one['trained_share']:.4f} "
            f"({one['trained_deviation']:+.4f}), consumed {one['consumed_share']:.4f} "
            f"({one['consumed_deviation']:+.4f})"
        )
    yield sentence(found)


def sentence(found: Mapping[str, Any]) -> str:
    """The largest deviation, in words."""
    name, away = found["largest"]["dataset"], found["largest"]["deviation"]
    one = found["datasets"][name]
    return (
        f"largest deviation from the mixture: {name}, {one['trained_share']:.4f} of the sequences trained, "
        f"planned {one['planned']:.4f} ({away:+.4f})"
    )


def _planned(analysis: Path) -> dict[str, float]:
    """The weight of each dataset of a mixture."""
    found: Counter[str] = Counter()
    for path, weight in Mixed(analysis).shards:
        found[_dataset(str(path))] += weight  # type: ignore[assignment]
    total = sum(found.values())
    if not total:
        raise DataError(f"{analysis}/mixture.yaml has no sources with weights")
    return {name: weight / total for name, weight in found.items()}


@cache
def _dataset(path: str) -> str:
    """The dataset of a packed shard, or of a tar of energon's."""
    shard = layout.Indexed.read(path)
    if shard:
        return str(shard.dataset)
    folder = told.dataset(f"{path}/") if path.endswith(".tar") else Path(path)
    found = layout.Energon.read(folder.as_posix())
    if not found:
        raise DataError(f"{path} is of no dataset of plait's", hint="it should be in data/")
    return str(found.dataset)


def _steps(run: layout.Run, said: Mapping[str, Any]) -> tuple[int, int]:
    """The first step that is the run's own, and the last that it has reached."""
    settings, last = said["settings"], told.reached(run, said)
    goes_on = settings["start_run"] and not settings["finetune"]
    first = settings["start_iteration"] + 1 if goes_on else 1
    if last < first:
        raise DataError(f"{run} was not trained yet", hint="it is audited after its first steps")
    return first, last


def _counts(run: layout.Run, said: Mapping[str, Any], names: list[str], steps: range) -> Counts:
    """How many sequences of each dataset each step consumed; none where nothing tells of a step."""
    found = np.zeros((len(steps), len(names)), np.int64)
    total, mixture = said["settings"]["global_batch_size"], Mixed(Path(said["analysis"]))
    packed = [_dataset(str(path)) for path, _ in mixture.shards]
    place = {name: number for number, name in enumerate(names)}
    for path in sorted(Path(run.samples).glob(lineage.PATTERN)):
        for step, line in numbered(path):
            if step in steps:
                for sample in json.loads(line)["samples"]:
                    found[step - steps.start, place[_of(sample, packed)]] += 1
    found[found.sum(axis=1) != total] = 0
    lost = np.flatnonzero(found.sum(axis=1) == 0).tolist()
    if lost and "tokenizer" not in mixture.content:
        order = told.order(run, said)
        for row in lost:
            first = (steps[row] - 1) * total
            for draw in range(first, first + total):
                found[row, place[packed[order[draw][0]]]] += 1
    return found


def _of(sample: Any, packed: list[str]) -> str:
    """The dataset of a sample of the log."""
    if isinstance(sample, str):
        tar, _, _ = sample.rpartition(told.TAR)
        return _dataset(f"{tar}.tar")
    source: int = sample[0]
    return packed[source]


def _realised(planned: float, own: Mapping[str, Any], sums: Mapping[str, Any]) -> dict[str, Any]:
    """Sequences of a dataset, their shares, and how far these are from the planned one."""
    found: dict[str, Any] = {}
    for key, sequences in own.items():
        share = float(sequences / max(int(sums[key].sum()), 1))
        found |= {key: int(sequences), f"{key}_share": share, f"{key}_deviation": share - planned}
    return found


def _largest(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    name = max(datasets, key=lambda one: abs(datasets[one]["trained_deviation"]))
    return {"dataset": name, "deviation": datasets[name]["trained_deviation"]}
