"""``plait convert``: a Hugging Face model as a whole Megatron one."""

import argparse

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "convert",
        "convert a Hugging Face model to a whole Megatron one",
        "data/models/raw_hf/Mistral-7B-v0.1 data/models/raw/Mistral-7b-megatron",
    )
    parser.add_argument("source", help=layout.HfModel.PATTERN)
    parser.add_argument("target", help=layout.Megatron.PATTERN)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the Megatron model and its manifest."""
    from pathlib import Path

    from plait.convert import folders

    source = Path(str(layout.HfModel.parse(args.source)))
    target = layout.Megatron.parse(args.target)
    chosen = settings(args, target)
    with files.appears_whole(str(target), folder=True) as folder:
        facts = folders.convert(source, folder)
        files.write_manifest(folder, kind="megatron", settings=chosen, inputs=[source], facts=facts)
