"""``plait shard``: cut a whole Megatron model for the grid that the target's name says."""

import argparse

from plait import layout
from plait.cli.common import Subparsers, add_parts, add_settings, add_stage, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    target = "data/models/sharded/solo-tiny-megatron-tp2-pp1"
    parser = add_stage(
        stages,
        "shard",
        "cut a whole Megatron model into a tensor x pipeline grid",
        f"data/models/raw/solo-tiny-megatron {target}\n"
        f"  plait shard data/models/raw/solo-tiny-megatron {target} --part 1/2\n"
        f"  plait shard data/models/raw/solo-tiny-megatron {target} --part 2/2\n"
        f"  plait shard data/models/raw/solo-tiny-megatron {target} --join 2",
    )
    parser.add_argument("source", help=layout.Megatron.PATTERN)
    parser.add_argument("target", help=layout.Sharded.PATTERN)
    add_settings(parser)
    add_parts(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the shards and their manifest, or a part of them."""
    from pathlib import Path

    from plait.convert.folders import Conversion
    from plait.convert.split import Job
    from plait.parallel.grid import Grid

    source = Path(str(layout.Megatron.parse(args.source)))
    target = layout.Sharded.parse(args.target)
    chosen = settings(args, target)
    first, last = (chosen.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last"))
    grid = Grid(tp=target.tp, pp=target.pp, first=first, last=last)
    job = Job(Conversion.of_whole(source, grid), target, "sharded", chosen)
    job.part(*args.part) if args.part else job.whole(args.join)
