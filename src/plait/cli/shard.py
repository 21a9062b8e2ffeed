"""``plait shard``: cut a whole Megatron model for the grid that the target's name says."""

import argparse

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "shard",
        "cut a whole Megatron model into a tensor x pipeline grid",
        "data/models/raw/solo-tiny-megatron data/models/sharded/solo-tiny-megatron-tp2-pp1",
    )
    parser.add_argument("source", help=layout.Megatron.PATTERN)
    parser.add_argument("target", help=layout.Sharded.PATTERN)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the shards and their manifest."""
    from pathlib import Path

    from plait.convert import folders
    from plait.parallel.grid import Grid

    source = Path(str(layout.Megatron.parse(args.source)))
    target = layout.Sharded.parse(args.target)
    chosen = settings(args, target)
    with files.appears_whole(str(target), folder=True) as folder:
        first, last = (chosen.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last"))
        facts = folders.shard(source, folder, Grid(tp=target.tp, pp=target.pp, first=first, last=last))
        files.write_manifest(folder, kind="sharded", settings=chosen, inputs=[source], facts=facts)
