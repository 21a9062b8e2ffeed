"""Read a few samples of a prepared dataset through energon: ``python -m plait.data.probe FOLDER``.

It compares them with what the tars hold, and says in one line what is wrong.
"""

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from plait.errors import PlaitError

SAMPLES = 8


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 and one line where energon gives something else than the tar."""
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.errors import SampleException, reraise_exception

    from plait.data import energon
    from plait.data.reader import Conversations

    folder = Path(arguments[0])
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
    try:
        found = {sample.id: sample for sample in islice(get_loader(dataset), SAMPLES)}
        expected = {one.id: one for one in energon.read(folder) if one.id in found}
    except (SampleException, PlaitError, ValueError, OSError, LookupError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        print(f"{type(cause).__name__}: {str(cause).splitlines()[0]}", file=sys.stderr)  # noqa: T201
        return 1
    different = [key for key in found if found[key] != expected.get(key)]
    if different or not found:
        print(f"energon reads other samples than the tars hold: {different[:1]}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
