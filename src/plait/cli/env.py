"""``plait env``: recipes of the images, digests of their bases, and what this host lacks."""

import argparse
import logging
from pathlib import Path

from plait.cli.common import Subparsers, add_stage
from plait.errors import ConfigError

log = logging.getLogger(__name__)


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "env",
        "say what this host lacks (check), write the recipes of the images (render), lock their bases (lock)",
        "check apptainer slurm",
    )
    parser.add_argument("action", choices=("check", "render", "lock"))
    parser.add_argument(
        "needs",
        nargs="*",
        metavar="NEED",
        help="check: what the host is for, besides running stages here: apptainer, slurm, gpu",
    )
    parser.add_argument("--folder", default="envs", help="folder of images.yaml (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="render: write nothing, name what is stale")
    parser.add_argument("--update", action="store_true", help="lock: ask for known digests again")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do the action."""
    {"check": check, "render": render, "lock": lock}[args.action](args)


def check(args: argparse.Namespace) -> None:
    """Say in a line each what is here; fail if something needed is not."""
    from plait.envs import host

    missing = []
    for found in host.findings(set(args.needs), Path(args.folder)):
        print(found)  # noqa: T201
        missing += [found.name] if found.missing else []
    if missing:
        raise ConfigError(f"this host lacks what is needed: {', '.join(missing)}")


def render(args: argparse.Namespace) -> None:
    """Write what follows from the list."""
    from plait import files
    from plait.envs import recipes

    for path, text in recipes.documents(Path(args.folder)).items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            raise ConfigError(f"{path} is not what {args.folder}/images.yaml says", hint="plait env render")
        with files.appears_whole(path) as part:
            part.write_text(text, encoding="utf-8")
        log.info("%s", path)


def lock(args: argparse.Namespace) -> None:
    """Write the digests of the bases, then the recipes that pull by them."""
    from plait.envs import recipes

    for base, digest in recipes.lock(Path(args.folder), update=args.update).items():
        log.info("%s is %s", base, digest)
    render(args)
