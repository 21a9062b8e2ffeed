"""The command line: ``plait STAGE INPUT... OUTPUT``."""

import argparse
import atexit
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence

import plait
from plait.errors import PlaitError

STAGES = (
    "lock",
    "fetch",
    "raw",
    "chat",
    "tokenizer",
    "index",
    "energon",
    "analyse",
    "build",
    "convert",
    "shard",
    "verify",
    "schedule",
    "train",
    "export",
    "report",
    "generate",
)
TOOLS = ("adopt", "repack", "audit", "diff", "preflight", "status", "trace", "env", "shell")
"""Commands that make no artifact."""
FEWEST = 50_000
"""Objects that are made before Python looks for cycles among them: more than a small stage loads."""


class Wide(argparse.RawDescriptionHelpFormatter):
    """Each stage and its help on one line of a wide terminal."""

    def __init__(self, prog: str) -> None:
        """Leave room for the longest stage's name, which argparse counts without its indent."""
        super().__init__(prog, max_help_position=16)
        self._action_max_length = len("    tokenizer")


def parser(stage: str = "") -> argparse.ArgumentParser:
    """The parser of one command, or of all; a stage's own code is loaded when it runs.

    Args:
        stage: the command that is called; where it is known, the others' parsers are not made.
    """
    top = argparse.ArgumentParser(
        prog="plait",
        description="From raw jsonl to a Hugging Face checkpoint through Megatron Core: one command a stage.",
        epilog="The workflow runs these for you:\n  snakemake --cores 2 data/ckpts/RUN/hf/model_iter_N",
        formatter_class=Wide,
    )
    top.add_argument("--version", action="version", version=f"plait {plait.__version__}")
    stages = top.add_subparsers(title="stages", prog=top.prog, metavar="STAGE", required=True)
    known = (*STAGES, *TOOLS)
    for name in (stage,) if stage in known else known:
        importlib.import_module(f"plait.cli.{name}").add(stages)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; 0 if it went well, 2 if its input or its words were wrong, 75 if asked to stop."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv[0] if argv else "").parse_args(argv)
    try:
        args.run(args)
    except PlaitError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.status
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)  # noqa: T201
        return 2
    except _of_databases() as error:
        hint = "\nhint:  look at the disk of temporary files (TMPDIR), and at the target's"
        print(f"error: a database that this job keeps: {error}{hint}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _of_databases() -> type[Exception]:
    """What SQLite raises where the disk is full or fails; it names no file."""
    import sqlite3

    return sqlite3.OperationalError


def run() -> None:
    """The command ``plait``: :func:`main` in a process of its own.

    A tenth of a small job would go into looking for cycles among what it loads, and into taking apart the
    interpreter in the end. So it leaves once threads and exit handlers are done, unless something was raised.
    """
    gc.set_threshold(FEWEST)
    ended: list[int] = []
    atexit.register(_leave, ended)  # before those of the stage, and so run after them
    ended.append(main())
    sys.exit(ended[0])


def _leave(ended: list[int]) -> None:
    if ended:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])


if __name__ == "__main__":
    run()
