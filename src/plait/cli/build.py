"""``plait build``: make or link a Hugging Face model."""

import argparse

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "build",
        "make a Hugging Face model: a random one, a longer vocabulary, SOLO, LLaVA, an unpacked GGUF file, "
        "or a link to a folder",
        "data/models/raw_hf/Mistral-tiny data/tokenizers/mistral-solo data/models/raw_hf/Solo-tiny",
    )
    parser.add_argument(
        "parts", nargs="*", help="the base model, the vision tower and the tokenizer, as its kind needs them"
    )
    parser.add_argument("target", help=layout.HfModel.PATTERN)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the model and its manifest."""
    from pathlib import Path

    from plait.models.build import build

    target = layout.HfModel.parse(args.target)
    parts = [Path(str(layout.parse(part))) for part in args.parts]
    chosen = settings(args, target)
    with files.appears_whole(str(target), folder=True) as folder:
        facts = build(folder, chosen["source"], parts)
        files.write_manifest(folder, kind="hf_model", settings=chosen, inputs=parts, facts=facts)
