"""``plait repack``: packs of SOLO and CodeActAgent as plait has them."""

import argparse
from pathlib import Path

from plait import files, layout
from plait.cli.common import Subparsers, add_stage


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "repack",
        "write packs of Megatron-LLM (SOLO, CodeActAgent) as plait's own; then `plait adopt` takes them",
        "data/tokenizers/solo data/megatron_format/mmistral_emoji_pack32768/shard_00000 --from theirs",
    )
    stage.add_argument("tokenizer", help=f"what made them: {layout.Tokenizer.PATTERN}")
    stage.add_argument("indexed", help=layout.Indexed.PATTERN)
    stage.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder with data-text.bin, data-text.idx and so on; it stays as it is",
    )
    stage.add_argument("--patch-size", type=int, default=32, help="side of a patch, in pixels")
    stage.add_argument(
        "--max-resolution", type=int, default=1024, help="longest side of a picture, in pixels"
    )
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the files; their manifest is for `plait adopt` to write, which compares them with config/."""
    from plait.tokens import originals

    target, tokenizer = layout.Indexed.parse(args.indexed), layout.Tokenizer.parse(args.tokenizer)
    keys = {"patch_size": args.patch_size, "max_resolution": args.max_resolution}
    with files.appears_whole(str(target), folder=True) as folder:
        originals.repack(folder, args.source, Path(str(tokenizer)), limit=target.seq, **keys)
