"""``plait chat``: raw lines to one shard of chat records with base64 pictures."""

import argparse
from pathlib import Path

from plait import layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.errors import LayoutError


def add(stages: Subparsers) -> None:
    """Add the command."""
    example = "data/raw/emoji data/processed/emoji/shard_00000.jsonl.gz"
    stage = add_stage(stages, "chat", "turn a raw source into one shard of chat records", example)
    stage.add_argument("source", help=layout.Raw.PATTERN)
    stage.add_argument("target", help=layout.Chat.PATTERN)
    add_settings(stage)
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the shard, its rejects and, last, its ledger."""
    from plait.data import shards

    source, target = layout.Raw.parse(args.source), layout.Chat.parse(args.target)
    if source.dataset != target.dataset:
        raise LayoutError(f"{target} is made from data/raw/{target.dataset}, not from {source}")
    shards.write(Path(str(source)), target, settings(args, target))
