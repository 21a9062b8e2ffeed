"""plait index: chat records to packed Megatron data."""

import argparse
from pathlib import Path

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
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
    parser.add_argument("indexed", help=layout.Indexed.PATTERN)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the shard and its manifest."""
    from plait.data import ledger
    from plait.tokens import build

    tokenizer = layout.Tokenizer.parse(args.tokenizer)
    target = layout.Indexed.parse(args.indexed)
    chosen = settings(args, target)
    form = chosen["format"]
    if form["tokenizer"] != tokenizer.tokenizer:
        raise ConfigError(
            f"format {target.format} uses the tokenizer {form['tokenizer']!r}, not {tokenizer.tokenizer!r}"
        )
    inputs = [Path(str(tokenizer)), *map(Path, args.chats)]
    with files.appears_whole(str(target), folder=True) as folder:
        facts = build.build(folder, inputs[0], inputs[1:], form, target.seq, chosen)
        ledger.balance(f"chat -> index, {target}", ledger.kept(args.chats), build.outcomes(facts))
        files.write_manifest(folder, kind="indexed", settings=chosen, inputs=inputs, facts=facts)
