"""``plait train``: from a sharded model or a checkpoint to the next checkpoint."""

import argparse
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
        "--around",
        metavar="JSON",
        help="how the run is started and what it tells, as the workflow gives it",
    )
    stage.add_argument(
        "--asked",
        metavar="JSON",
        help="until which iteration it goes on, and which others of the run stay, as the workflow gives it",
    )
    stage.add_argument("--image", metavar="SIF", default="", help="an Apptainer image to train in")
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check what can be checked without starting a process, then start them."""
    from plait.train.job import Job
    from plait.train.launch import launch

    target = layout.Iteration.parse(args.target)
    job = Job(
        start=layout.inside(args.start),
        analysis=layout.inside(args.analysis),
        schedule=layout.inside(args.schedule),
        target=str(target),
        settings=settings(args, target),
        around=around(args, target.run),
        asked=asked(args, target),
    )
    job.check()
    launch(job, args.image)


def around(args: argparse.Namespace, run: str) -> dict[str, Any]:
    """How the run is started and what it tells: as the workflow gives it, or as the config says.

    Raises:
        ConfigError: it is no JSON of such keys, or the config file is wrong.
    """
    from plait.config import Plan
    from plait.config.model import load_file
    from plait.config.run import Around

    if args.around is None and args.settings is None:
        return Plan(load_file(args.config)).around(run)
    return _read(Around, "--around", args.around or "{}")


def asked(args: argparse.Namespace, target: layout.Iteration) -> dict[str, Any]:
    """What is asked of the job besides its checkpoint: as the workflow gives it, or as the config says.

    Raises:
        ConfigError: as :func:`around`.
    """
    from plait.config import Plan
    from plait.config.model import load_file
    from plait.config.run import Asked

    if args.asked is not None:
        return _read(Asked, "--asked", args.asked)
    if args.settings is None:
        return Plan(load_file(args.config)).besides(target, [target.iteration])
    return Asked(until=target.iteration).model_dump(mode="json")


def _read(kind: Any, option: str, text: str) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        found: dict[str, Any] = kind.model_validate_json(text).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{option} {text!r}: {where}: {first['msg']}") from error
    return found
