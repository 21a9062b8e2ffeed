"""What the stages' commands share: where their settings come from."""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait import files
from plait.errors import ConfigError
from plait.layout import BATCHES, Artifact, Batch, inside

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001
else:
    Subparsers = Any


def add_stage(stages: Subparsers, name: str, help_: str, example: str) -> argparse.ArgumentParser:
    """Add a command whose ``--help`` ends with an example."""
    return stages.add_parser(
        name,
        help=help_,
        description=help_[0].upper() + help_[1:] + ".",
        epilog=f"example:\n  plait {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Let a command take its settings from config/, or from the workflow as one JSON text."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--config", default="config/config.yaml", help="config file (default: %(default)s)")
    group.add_argument("--settings", metavar="JSON", help="the settings, as the workflow gives them")


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Let several jobs make a target together."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="write the K-th of N parts of a large model, beside the target; parts may run at once, and each "
        "again. They use the disk that the target will have",
    )
    group.add_argument(
        "--join", type=int, default=0, metavar="N", help="check N parts, and put them into place; 0: no parts"
    )


def count(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    """K/N as two numbers."""
    number, stroke, of = text.partition("/")
    if not (stroke and number.isdecimal() and of.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 2/4")
    return int(number), int(of)


def settings(args: argparse.Namespace, artifact: Artifact, stage: str = "") -> dict[str, Any]:
    """The settings that decide the content of ``artifact``.

    Raises:
        ConfigError: the JSON text or the config file is wrong.
    """
    if args.settings is None:
        from plait.config import Plan
        from plait.config.model import load_file

        return Plan(load_file(args.config)).settings(artifact, stage)
    try:
        found: dict[str, Any] = json.loads(args.settings)
    except ValueError as error:
        raise ConfigError(f"--settings is not JSON: {error}") from error
    return found


def one_or_batch(path: str, kind: type[Artifact]) -> Any:
    """A shard, or a batch of shards, by its path.

    Raises:
        LayoutError: the path is of another kind.
    """
    batch = BATCHES[kind]
    return batch.read(inside(path)) or kind.parse(path)


def missing(
    target: Any, chosen: Mapping[str, Any], inputs: Callable[[Any], Sequence[Path | str]]
) -> Iterator[Any]:
    """The shard that is asked for; of a batch, each that does not stand yet with these settings and inputs.

    Args:
        target: a shard or a batch.
        chosen: its settings.
        inputs: what a shard is made from.
    """
    if not isinstance(target, Batch):
        yield target
        return
    for shard in target.shards:
        if files.stands(shard, chosen, inputs(shard)):
            log.info("%s stands", shard)
        else:
            yield shard
