"""What energon itself makes of a dataset: ``python -m plait.data.probe FOLDER [OPTION]...``.

It prepares the folder, with options of ``energon prepare``, reads a few samples of the training split through
energon, and compares them with what the tars hold. It is a process of its own: energon imports torch, prints,
and ends by ``sys.exit``.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from plait.errors import PlaitError

SAMPLES = 8
AS_IT_IS = "--as-it-is"
"""Instead of options: read what someone else has prepared, and write nothing."""
QUIET = ("--non-interactive", "--no-progress", "--num-workers", "1", "--skip-dataset-yaml")
"""Options that keep ``energon prepare`` from asking."""
FAULTS = (AssertionError, ValueError, TypeError, LookupError)
"""What energon raises where fields and samples do not fit."""


def run(folder: Path, *options: str) -> dict[str, Any]:
    """What :func:`main` finds, in a process; ``failed``, its last words, where that ends by an error."""
    command = [sys.executable, "-m", "plait.data.probe", str(folder), *options]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return {"failed": said[-1] if said else "it said nothing"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> int:
    """Prepare, read, and print one line of JSON: samples of each split, or what is wrong in a sentence."""
    from plait.data.meta import INFO

    folder = Path(arguments[0])
    if arguments[1:] != [AS_IT_IS]:
        prepare(folder, arguments[1:])
    if not (folder / INFO).is_file():
        return 1
    print(json.dumps(read(folder)))  # noqa: T201 - this line is the result
    return 0


def prepare(folder: Path, options: Sequence[str]) -> None:
    """Run ``energon prepare``; it raises, or exits, or says that it did nothing."""
    from megatron.energon.cli.main import main as energon

    from plait.config.paths import SPLIT
    from plait.data import meta
    from plait.data.energon import GIVEN_SPLIT

    energon.main(["prepare", str(folder), *QUIET, *options], standalone_mode=False)
    if (folder / GIVEN_SPLIT).is_file():
        (folder / GIVEN_SPLIT).replace(folder / SPLIT)
    if (folder / meta.LEFT_OUT).is_file():
        split, rejected = (meta.read_yaml(folder / name) for name in (SPLIT, meta.LEFT_OUT))
        left_out = [*(split.get("exclude") or ()), *rejected["exclude"]]
        meta.write_yaml(folder / SPLIT, {**split, "exclude": left_out})
        (folder / meta.LEFT_OUT).unlink()


def read(folder: Path) -> dict[str, Any]:
    """Samples of each split as plait counts them, and ``wrong``: why training cannot read them so."""
    from megatron.energon.errors import SampleException
    from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError

    from plait.data import energon

    splits = energon.splits(folder)
    counts = dict.fromkeys(splits, 0)
    try:
        some = islice(_training(folder), SAMPLES) if splits["train"] else ()
        found = {sample.id: sample for sample in some}
        for split in splits:
            for sample in energon.read(folder, split):
                counts[split] += 1
                if sample.id in found and found.pop(sample.id) != sample:
                    return {"wrong": f"energon reads sample {sample.id!r} otherwise than plait does"}
    except (SampleException, EmptyDatasetError, PlaitError, *FAULTS) as error:
        return {"wrong": _ours(folder) or _first_cause(error)}
    wrong = f"energon reads sample {found.popitem()[0]!r}, plait does not" if found else ""
    return {"splits": counts, "wrong": wrong}


def _training(folder: Path) -> Any:
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.errors import reraise_exception

    from plait.data.reader import Conversations

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    dataset = get_train_dataset(
        folder,
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Conversations(),
        repeat=False,
    )
    return get_loader(dataset)


def _ours(folder: Path) -> str:
    """What our own reader objects to; it names shard and sample. Empty where it has no objection."""
    from plait.data import energon

    try:
        for split in energon.splits(folder):
            deque(energon.read(folder, split), maxlen=0)
    except PlaitError as error:
        return _first_cause(error)
    return ""


def _first_cause(error: BaseException) -> str:
    """The sentence of ours that names the sample, or else what energon stumbled over."""
    while error.__cause__ is not None and not isinstance(error, PlaitError):
        error = error.__cause__
    said = str(error).splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'it says nothing'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
