"""plait analyse: count tokens, weigh a mixture."""

import argparse

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "analyse",
        "count the tokens of indexed shards and weigh them into a mixture",
        "data/megatron_format/mmistral_emoji_pack256/shard_0000{0,1,2} data/analysis/captions",
    )
    parser.add_argument("indexed", nargs="+", help=layout.Indexed.PATTERN)
    parser.add_argument("analysis", help=layout.Analysis.PATTERN)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the analysis and its manifest."""
    from plait.tokens import analysis

    shards = [layout.Indexed.parse(path) for path in args.indexed]
    target = layout.Analysis.parse(args.analysis)
    chosen = settings(args, target)
    with files.appears_whole(str(target), folder=True) as folder:
        facts = analysis.build(folder, target.mixture, shards, chosen["mixture"])
        files.write_manifest(
            folder,
            kind="analysis",
            settings=chosen,
            inputs=map(str, shards),
            facts=facts,
            unlisted=frozenset({analysis.PAGE}),
        )
