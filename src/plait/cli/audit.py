"""``plait audit``: the mixture that a run consumed, beside the planned one."""

import argparse
import json

from plait.cli.common import Subparsers, add_stage


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "audit",
        "compare what a run consumed of each dataset with its mixture",
        "chat-tiny",
    )
    stage.add_argument("run_name", metavar="RUN", help="a run, data/ckpts/RUN")
    stage.add_argument("--json", action="store_true", help="as one JSON object, for programs")
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print it, and keep it as audit.json beside the run."""
    from plait.report import audit

    found = audit.audit(args.run_name)
    for line in [json.dumps(found)] if args.json else audit.in_words(found):
        print(line)  # noqa: T201 - this command is read on a terminal
