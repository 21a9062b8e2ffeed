"""``plait shell``: the training environment, interactively."""

import argparse
import os
from typing import Any

from plait.cli.common import Subparsers, add_stage
from plait.errors import ConfigError


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "shell",
        "open a shell in the training environment",
        "--slurm --apptainer --print -- --partition=gpu --gpus=1",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--apptainer", action="store_true", help="in the GPU image of config/")
    where.add_argument("--docker", action="store_true", help="in an image of docker's (plait:gpu)")
    parser.add_argument("--slurm", action="store_true", help="on a node that Slurm gives")
    parser.add_argument("--image", help="another image")
    parser.add_argument("--print", action="store_true", help="show the command, start nothing")
    parser.add_argument("--config", default="config/config.yaml", help="config file (default: %(default)s)")
    parser.add_argument("words", nargs="*", help="more words for srun, docker or apptainer, after --")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Become the shell.

    Raises:
        ConfigError: the image, or the program that opens it, is not here.
    """
    from plait.envs import shell

    if args.docker and args.slurm:
        raise ConfigError("--docker starts on this machine, --slurm on another", hint="take --apptainer")
    way: shell.Way = "apptainer" if args.apptainer else "docker" if args.docker else "here"
    named, image = _image(args)
    command = shell.command(way, image, slurm=args.slurm, words=args.words)
    around = shell.surroundings(way, named)
    if args.print:
        print(shell.printed(command, around))  # noqa: T201
        return
    try:
        os.execvpe(command[0], command, {**os.environ, **around})  # noqa: S606
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} is not on PATH", hint="plait env check") from error


def _image(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The config, for the paths that it names, and the image."""
    if args.docker or not args.apptainer:
        return {}, args.image or "plait:gpu"
    from plait.config.model import load_file

    config = load_file(args.config)
    named = config.model_dump(mode="json", exclude={"images"})
    return named, args.image or config.images.path("gpu")
