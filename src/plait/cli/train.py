"""``plait train``: from a sharded model or a checkpoint to the next checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from plait import layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.errors import ConfigError


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "train",
        "train a run up to one of its checkpoints, under torchrun",
        "data/models/sharded/chat-tiny-megatron-tp1-pp2 data/analysis/talk "
        "data/ckpts/chat-tiny/schedule.json data/ckpts/chat-tiny/iter_0000050",
    )
    stage.add_argument("start", help="a sharded model, or the run's previous checkpoint")
    stage.add_argument("analysis", help="the mixture's analysis, data/analysis/MIXTURE")
    stage.add_argument("schedule", help="the run's schedule.json")
    stage.add_argument("target", help="the checkpoint, data/ckpts/RUN/iter_NNNNNNN")
    add_settings(stage)
    stage.add_argument(
        "--logging", metavar="JSON", help="what the run tells while it trains, as the workflow gives it"
    )
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check what can be checked without starting a process, then start them."""
    from plait.train.job import Job, lock
    from plait.train.launch import launch

    target = layout.Iteration.parse(args.target)
    job = Job(
        start=layout.inside(args.start),
        analysis=layout.inside(args.analysis),
        schedule=layout.inside(args.schedule),
        target=str(target),
        settings=settings(args, target),
        logged=logged(args, target.run),
    )
    job.check()
    with lock(Path(str(layout.Run(run=target.run)))):
        pass  # free now; rank 0 takes it
    launch(job)


def logged(args: argparse.Namespace, run: str) -> dict[str, Any]:
    """What the run tells while it trains: as the workflow gives it, or as the config says.

    Raises:
        ConfigError: it is no JSON of such keys, or the config file is wrong.
    """
    from pydantic import ValidationError

    from plait.config import Plan
    from plait.config.model import load_file
    from plait.config.run import Logging

    if args.logging is None and args.settings is None:
        return Plan(load_file(args.config)).logged(run)
    try:
        return Logging.model_validate_json(args.logging or "{}").model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(
            f"--logging {args.logging!r} is not what a run can tell: {error.errors()[0]['msg']}"
        ) from error
