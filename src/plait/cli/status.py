"""``plait status``: what is live, what is stale, and what killed jobs left."""

import argparse

from plait.cli.common import Subparsers, add_stage


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "status",
        "say which runs are live, which locks are stale, and what killed jobs left",
        "chat-tiny",
    )
    stage.add_argument("name", nargs="?", default="", metavar="RUN", help="a run; all where none is named")
    stage.add_argument(
        "--clean", action="store_true", help="remove what killed jobs left; nothing of a process that lives"
    )
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print it."""
    from plait.report import state

    for one in state.runs(args.name):
        _say(str(one))
        for line in state.of_run(one):
            _say(f"  {line}")
    locked = state.workflow_lock()
    if locked:
        _say(f"workflow: {locked}")
    parts = state.parts()
    if parts:
        _say("half written:")
    for part in parts:
        advice = {
            "live": f"{part.writer} writes it",
            "gone": f"{part.writer} is gone" + ("" if args.clean else "; plait status --clean removes it"),
            "unknown": f"{part.writer}, which cannot be asked from here; plait status --clean does so there",
        }
        _say(f"  {part.path}, {part.bytes / 1e6:.1f} MB: {advice[part.state]}")
    if not (parts or locked or state.runs()):
        _say("nothing: no run, no lock, nothing half written")
    if args.clean:
        for part in state.clean(parts):
            _say(f"removed: {part.path}")


def _say(line: str) -> None:
    print(line)  # noqa: T201 - this command is read on a terminal
