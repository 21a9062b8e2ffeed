"""``plait lock``: which commit each `repo@revision` of config/ is."""

import argparse
import logging

from plait import layout
from plait.cli.common import Subparsers, add_stage

log = logging.getLogger(__name__)


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "lock",
        "resolve what config/ takes from the hub, and keep commits and digests in config/hub.lock.json",
        "--config config/plans/codeact-mistral-7b.yaml",
    )
    stage.add_argument(
        "targets", nargs="*", metavar="target", help=f"{layout.HubTree.PATTERN}; none: all of config/"
    )
    stage.add_argument("--config", default="config/config.yaml", help="config file (default: %(default)s)")
    stage.add_argument("--update", action="store_true", help="ask again for what is locked")
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Ask the hub for what is not locked."""
    from plait.fetch.locking import lock_tree

    trees = [layout.HubTree.parse(target) for target in args.targets] or _all(args.config)
    for tree in trees:
        lock_tree(tree, again=args.update)
    log.info("%d locked", len(trees))


def _all(config: str) -> list[layout.HubTree]:
    from plait.config import Plan
    from plait.config.model import load_file

    sources = Plan(load_file(config)).fetchables().values()
    return list(dict.fromkeys(source.tree for source in sources if hasattr(source, "tree")))
