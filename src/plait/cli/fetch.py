"""``plait fetch``: one file of the hub, a URL or a package, whole and checked."""

import argparse
import logging

from plait import layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings

log = logging.getLogger(__name__)


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "fetch",
        "fetch one file of the hub, a URL or a package, or go on with it, and check it",
        "data/hub/models--mistralai--Mistral-7B-v0.1/COMMIT/config.json",
    )
    stage.add_argument("target", help=layout.HubFile.PATTERN)
    add_settings(stage)
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Bring the file."""
    from plait.fetch.fetch import fetch

    target = layout.HubFile.parse(args.target)
    found = fetch(target, settings(args, target)["file"])
    log.info("%s: %d bytes, sha256 %s", target, found.bytes, found.sha256)
