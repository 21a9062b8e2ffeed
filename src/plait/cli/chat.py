"""``plait chat``: raw lines to one shard of chat records with base64 pictures."""

import argparse
from pathlib import Path

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, missing, one_or_batch, settings
from plait.errors import LayoutError


def add(stages: Subparsers) -> None:
    """Add the command."""
    example = "data/raw/emoji data/processed/emoji/shard_00000.jsonl.gz"
    stage = add_stage(stages, "chat", "turn a raw source into one shard of chat records", example)
    stage.add_argument("source", help=layout.Raw.PATTERN)
    stage.add_argument("target", help=f"{layout.Chat.PATTERN}, or {layout.ChatBatch.PATTERN}")
    add_settings(stage)
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the shard, its rejects and, last, its ledger; of a batch, those that do not stand yet."""
    from plait.data import shards

    source, target = layout.Raw.parse(args.source), one_or_batch(args.target, layout.Chat)
    if source.dataset != target.dataset:
        raise LayoutError(f"{target} is made from data/raw/{target.dataset}, not from {source}")
    raw, chosen = Path(str(source)), settings(args, target)
    for shard in missing(target, chosen, lambda _: [raw]):
        shards.write(raw, shard, chosen)
    if isinstance(target, layout.Batch):
        files.write_batch(target, chosen, [raw])
