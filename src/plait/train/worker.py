"""What torchrun starts on every rank: ``python -m plait.train.worker JOB``.

It imports nothing heavy by itself: saving a checkpoint spawns a process that imports this module again.
"""

import json
import logging
import os
import sys


def main() -> int:
    """Run the job given as JSON; only rank 0 tells what went wrong."""
    from plait.errors import PlaitError
    from plait.train.job import Job
    from plait.train.signals import ignore, listen

    listen()
    first = os.environ["RANK"] == "0"
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        from plait.train.rank import run_rank

        run_rank(Job(**json.loads(sys.argv[1])))
    except PlaitError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    finally:
        ignore()  # asked again, it would be ended by what Python leaves of its handlers
    return 0


if __name__ == "__main__":
    sys.exit(main())
