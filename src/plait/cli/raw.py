"""``plait raw``: fetch, link or draw a raw source."""

import argparse
import logging

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.errors import ConfigError

log = logging.getLogger(__name__)


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(stages, "raw", "make or link a raw source of data", "data/raw/emoji")
    stage.add_argument("target", help=layout.Raw.PATTERN)
    add_settings(stage)
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the source and its manifest."""
    from plait.data import shaped, sources

    target = layout.Raw.parse(args.target)
    chosen = settings(args, target)
    if not chosen.get("source"):
        raise ConfigError(f"dataset {target.dataset} packs others together and has no source itself")
    shaped.check_told(chosen)
    with files.appears_whole(str(target), folder=True) as folder:
        facts = sources.make(chosen["source"], folder)
        files.write_manifest(
            folder,
            kind="raw",
            settings=chosen,
            inputs=sources.inputs(chosen["source"]),
            facts=facts,
            unlisted=sources.unlisted(chosen["source"]),
        )
    log.info("%s: %s", target, ", ".join(f"{number} {what}" for what, number in facts.items()))
