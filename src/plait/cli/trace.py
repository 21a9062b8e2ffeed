"""``plait trace``: the raw lines that a step of a run was trained on."""

import argparse
import json

from plait.cli.common import Subparsers, add_stage


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "trace",
        "list the raw lines that a step of a run was trained on",
        "chat-tiny --step 7",
    )
    stage.add_argument("run_name", metavar="RUN", help="a run, data/ckpts/RUN")
    stage.add_argument("--step", type=int, required=True, metavar="K", help="an iteration of it, from 1")
    stage.add_argument("--json", action="store_true", help="as one JSON object, for programs")
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print it."""
    from plait.report import trace

    found = trace.trace(args.run_name, args.step)
    for line in [json.dumps(found)] if args.json else trace.in_words(found):
        print(line)  # noqa: T201 - this command is read on a terminal
