"""``plait report``: the loss curve of a run."""

import argparse
import logging
from pathlib import Path

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.errors import LayoutError

log = logging.getLogger(__name__)


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "report",
        "draw the loss curve of a run, up to the last of its exports",
        "data/ckpts/chat-tiny/metrics.jsonl data/reports/chat-tiny/loss.svg",
    )
    stage.add_argument("metrics", help=layout.pattern(layout.Run, layout.METRICS))
    stage.add_argument("picture", help=f"{layout.LossCurve.PATTERN}, or .png instead")
    add_settings(stage)
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw the picture."""
    picture = Path(layout.inside(args.picture))
    target = layout.LossCurve.parse(picture.with_suffix(".svg"))
    metrics = Path(layout.inside(args.metrics))
    expected = layout.Run(run=target.run).metrics
    if str(metrics) != expected:
        raise LayoutError(f"{picture} is not drawn from {metrics}", hint=f"it is drawn from {expected}")
    exports = settings(args, target)["exports"]
    from plait.report import curves

    curve = curves.read(metrics, last=max(exports, default=None))
    with files.appears_whole(picture) as part:
        curves.draw(curve, part, form=picture.suffix.removeprefix("."), name=target.run, exports=exports)
    log.info("%s: %s", picture, curves.sentence(curve))
