"""A run with ``debug: true``: ``python -m plait.train.debug JOB``, one process under Python's debugger.

It trains a few iterations of one sequence each, from the weights that the job would start from, in the
terminal that it was asked from. Of what it does nothing is kept.
"""

import bdb
import json
import logging
import os
import pdb  # noqa: T100 - it is what is asked for
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait import layout
from plait.config.run import Around, Parallel
from plait.errors import ConfigError, PlaitError, Stopped
from plait.train.job import Job
from plait.train.node import free_port

if TYPE_CHECKING:
    from plait.train.loop import Trainer

ITERATIONS = 5
TINY: dict[str, Any] = {
    "micro_batch_size": 1, "global_batch_size": 1, "num_workers": 0, "data_streams": None,
    "lr_warmup_tokens": None,
    "num_layers_in_first_pipeline_stage": None, "num_layers_in_last_pipeline_stage": None,
}  # fmt: skip
"""A debugger sees its own process only, and reads one sequence at a time; tokens of such are no warmup."""
HELP = """\
The debugger stands before the first iteration: `c` goes on, `b trainer._iteration` stops in each of them,
`breakpoint()` in any code stops there, `q` ends it. An error is shown where it was raised."""


def alone(job: Job) -> Job:
    """The job in one process: its parallel keys and what is told around it are at their defaults."""
    single = {key: field.default for key, field in Parallel.model_fields.items() if key in job.settings}
    start = layout.parse(job.start)
    begun = {"init": "checkpoint", "start_run": start.run} if isinstance(start, layout.Iteration) else {}
    around = Around(debug=True, peak_tflops=job.around["peak_tflops"]).model_dump(mode="json")
    return replace(job, settings={**job.settings, **single, **TINY, **begun}, around=around)


def check_terminal(run: str) -> None:
    """Refuse to debug where nobody can type.

    Raises:
        ConfigError: standard input is no terminal.
    """
    if not os.isatty(0):
        raise ConfigError(
            f"runs.{run} has `debug: true`, and standard input is no terminal to type into its debugger",
            hint="ask from a terminal of this machine, without a cluster's profile; or leave `debug` out",
        )


def take_terminal() -> None:
    """Speak to the terminal: the workflow sends what a job says into its log."""
    terminal = os.open(os.ttyname(0), os.O_RDWR)
    for number in (1, 2):
        if not os.isatty(number):
            os.dup2(terminal, number)
    os.close(terminal)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def session(trainer: "Trainer") -> None:
    """Stand before the first iteration, then train a few; what they write goes with the session."""
    with tempfile.TemporaryDirectory(prefix="plait-debug-") as folder:
        print(HELP)  # noqa: T201
        pdb.Pdb(nosigint=True).set_trace(sys._getframe())  # noqa: SLF001 - to stand here
        trainer.train(min(ITERATIONS, trainer.length), folder=Path(folder))


@contextmanager
def post_mortem() -> Iterator[None]:
    """Stand where something was raised that is no sentence for the user."""
    try:
        yield
    finally:
        kind, error, trace = sys.exc_info()
        if kind is not None and not issubclass(kind, PlaitError | bdb.BdbQuit | SystemExit):
            traceback.print_exception(error)
            pdb.post_mortem(trace)
            sys.exit(1)


def environment() -> dict[str, str]:
    """The place of the only rank of a world."""
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip


def main() -> int:
    """Debug the job given as JSON; it ends without the checkpoint that was asked for."""
    job = Job(**json.loads(sys.argv[1]))
    try:
        check_terminal(job.run.run)
        take_terminal()
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        logging.getLogger("megatron").setLevel(logging.ERROR)
        os.environ |= environment()
        from plait.train.rank import run_rank

        with suppress(bdb.BdbQuit), post_mortem():
            run_rank(alone(job))
        raise Stopped(
            f"runs.{job.run.run} has `debug: true`: {job.target} was not made, and nothing is kept",
            hint="leave `debug` out and ask again",
        )
    except PlaitError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.status


if __name__ == "__main__":
    sys.exit(main())
