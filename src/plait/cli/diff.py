"""``plait diff``: two models tensor by tensor, in whatever layouts they are."""

import argparse
import sys
from pathlib import Path

from plait.cli.common import Subparsers, add_stage


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "diff",
        "compare two models tensor by tensor, whatever layouts they are in; status 1 where they differ",
        "data/models/raw_hf/Mistral-7B-v0.1 data/ckpts/RUN/iter_0000100",
    )
    for name in ("first", "second"):
        stage.add_argument(name, type=Path, help="a Hugging Face folder, a Megatron model, a checkpoint")
    stage.add_argument(
        "--hf",
        type=Path,
        metavar="FOLDER",
        help="says what model a checkpoint is that has no config beside it",
    )
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print each tensor that differs, and how many do not."""
    from plait.convert import compare, layouts

    first, second = (layouts.opened(path, hf=args.hf)[1] for path in (args.first, args.second))
    found = list(compare.diff(first, second))
    for name, how in found:
        print(f"{name} {how}")  # noqa: T201 - this command is read on a terminal
    total = len(first.shapes.keys() | second.shapes.keys())
    print(f"{total - len(found)} of {total} tensors are bit-equal")  # noqa: T201
    if found:
        sys.exit(1)
