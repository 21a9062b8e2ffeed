"""plait index: chat records to packed Megatron data."""

import argparse
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, missing, one_or_batch, settings
from plait.errors import ConfigError


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "index",
        "tokenise and pack chat records into Megatron's indexed format",
        "data/tokenizers/mistral-chatml data/processed/dialogues/shard_00000.jsonl.gz \\\n"
        "      data/megatron_format/chatml_dialogues_pack256/shard_00000",
    )
    parser.add_argument("tokenizer", help=layout.Tokenizer.PATTERN)
    parser.add_argument("chats", nargs="+", help=f"{layout.Chat.PATTERN}; several are packed jointly")
    parser.add_argument("indexed", help=f"{layout.Indexed.PATTERN}, or {layout.IndexedBatch.PATTERN}")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the shard and its manifest; of a batch, those that do not stand yet."""
    tokenizer = layout.Tokenizer.parse(args.tokenizer)
    target = one_or_batch(args.indexed, layout.Indexed)
    chosen = settings(args, target)
    if chosen["format"]["tokenizer"] != tokenizer.tokenizer:
        raise ConfigError(
            f"format {target.format} uses the tokenizer {chosen['format']['tokenizer']!r}, "
            f"not {tokenizer.tokenizer!r}"
        )
    chats = layout.shards_of(args.chats)

    def inputs(shard: layout.Indexed) -> list[Path]:
        several = chats
        if isinstance(target, layout.Batch):
            names = dict.fromkeys(one.dataset for one in chats)
            several = [layout.Chat(dataset=name, shard=shard.shard) for name in names]
        return [Path(str(one)) for one in (tokenizer, *several)]

    for shard in missing(target, chosen, inputs):
        _write(shard, inputs(shard), chosen)
    if isinstance(target, layout.Batch):
        files.write_batch(target, chosen, [str(tokenizer)])


def _write(target: layout.Indexed, inputs: list[Path], chosen: dict[str, Any]) -> None:
    """Write one shard from its tokenizer and its chat records."""
    from plait.data import ledger
    from plait.tokens import build

    tokenizer, *chats = inputs
    with files.appears_whole(str(target), folder=True) as folder:
        facts = build.build(folder, tokenizer, chats, chosen["format"], target.seq, chosen)
        ledger.balance(f"chat -> index, {target}", ledger.kept(chats), build.outcomes(facts))
        files.write_manifest(folder, kind="indexed", settings=chosen, inputs=inputs, facts=facts)
