"""plait tokenizer: make a tokenizer, or extend one."""

import argparse

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "tokenizer",
        "make a tokenizer, or extend one by vision, location or chat tokens",
        "data/tokenizers/mistral-v1 data/tokenizers/mistral-chatml",
    )
    parser.add_argument(
        "base",
        nargs="?",
        help="the tokenizer that it extends, or the model that it is of, if it is made from one",
    )
    parser.add_argument("tokenizer", help=layout.Tokenizer.PATTERN)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the tokenizer and its manifest."""
    from pathlib import Path

    from plait.tokens import encode, tokenizer

    target = layout.Tokenizer.parse(args.tokenizer)
    chosen = settings(args, target)
    base = None if args.base is None else Path(str(layout.parse(args.base)))
    with files.appears_whole(str(target), folder=True) as folder:
        facts = {**tokenizer.build(folder, chosen["source"], base), **encode.compared(folder)}
        inputs = [] if base is None else [base]
        files.write_manifest(folder, kind="tokenizer", settings=chosen, inputs=inputs, facts=facts)
