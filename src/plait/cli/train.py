"""``plait train``: from a sharded model or a checkpoint to the next checkpoint."""

import argparse
import logging
from typing import TYPE_CHECKING, Any

from plait import layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.errors import ConfigError, DataError

if TYPE_CHECKING:
    from plait.train.job import Job

log = logging.getLogger(__name__)


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
        help="how the run is started, what it tells, and until which iteration it goes on, as the workflow "
        "gives it",
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
        **beside(args, target),
    )
    job.check()
    launch(job, args.image)
    if job.steps[1] == job.train_iters and not job.around["debug"]:
        _audit(job)


def _audit(job: "Job") -> None:
    """Tell how far what the whole run consumed is from its mixture; where that is unknown it is trained."""
    from plait.report import audit

    try:
        log.info("%s", audit.sentence(audit.audit(job.run.run)))
    except DataError as error:
        log.warning("%s is not audited: %s", job.run, error)


def beside(args: argparse.Namespace, target: layout.Iteration) -> dict[str, Any]:
    """How the run is started and what is asked of the job: as the workflow gives it, or as the config says.

    Raises:
        ConfigError: it is no JSON of such keys, or the config file is wrong.
    """
    from pydantic import ValidationError

    from plait.config import Plan
    from plait.config.asking import Asking
    from plait.config.model import load_file
    from plait.config.run import Asked, Beside

    if args.around is None and args.settings is None:
        told = Asking(Plan(load_file(args.config))).around(target)
        return {"asked": told.pop("asked"), "around": told}
    try:
        found = Beside.model_validate_json(args.around or "{}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--around {args.around!r}: {where}: {first['msg']}") from error
    asked = found.asked or Asked(until=target.iteration)
    return {
        "around": found.model_dump(mode="json", exclude={"asked"}),
        "asked": asked.model_dump(mode="json"),
    }
