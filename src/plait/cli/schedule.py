"""plait schedule: the iterations of a run, from the counted data."""

import argparse
import logging
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.config.schedule import LLAVA, Schedule
from plait.errors import DataError, LayoutError

log = logging.getLogger(__name__)


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "schedule",
        "compute a run's iterations and save interval from its mixture",
        "data/analysis/captions data/ckpts/solo-tiny/schedule.json",
    )
    parser.add_argument("analysis", help=layout.Analysis.PATTERN)
    parser.add_argument("schedule", help=f"{layout.Run.PATTERN}/schedule.json")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write schedule.json."""
    analysis = Path(str(layout.Analysis.parse(args.analysis)))
    target = layout.Run.parse(Path(args.schedule).parent)
    if Path(args.schedule).name != Path(target.schedule).name:
        raise LayoutError(f"{args.schedule!r} is not a schedule", hint=f"expected {target.schedule}")
    chosen = settings(args, target)
    instances = total_instances(analysis)
    schedule = Schedule.of(chosen, instances, sequence=chosen["seq_length"])
    assert schedule is not None
    files.write_json(
        target.schedule,
        {
            "schema": files.SCHEMA,
            "kind": "schedule",
            **schedule.to_json(),
            "settings": chosen,
            "inputs": {str(analysis): files.digest_of_input(analysis)},
        },
    )
    log.info("%s", sentence(schedule, chosen, instances))


def total_instances(analysis: Path) -> int:
    """Sequences of a mixture: packs, or energon's samples.

    Raises:
        DataError: the analysis is not whole, or its mixture.yaml does not say.
    """
    import yaml

    files.read_manifest(analysis, kind="analysis")
    mixture = yaml.safe_load((analysis / "mixture.yaml").read_text(encoding="utf-8"))
    try:
        return int(mixture["total_instances"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{analysis}/mixture.yaml gives no number as total_instances") from error


def sentence(schedule: Schedule, chosen: dict[str, Any], instances: int) -> str:
    """The arithmetic in words."""
    total, size, epochs = schedule.train_iters, chosen["global_batch_size"], chosen["epochs"]
    if chosen["recipe"] in LLAVA:
        epoch = f"{instances} // {size}" if instances >= size else f"max({instances} // {size}, 1)"
    else:
        epoch = f"({instances} // {size} + 1)"
    given = f" = {epoch} * {epochs}" if epochs else ""
    return (
        f"train_iters{given} = {total}; it saves every {schedule.save_interval} iterations and its final one"
    )
