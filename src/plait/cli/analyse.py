"""plait analyse: count tokens, weigh a mixture."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, count, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "analyse",
        "count the tokens of indexed shards and weigh them into a mixture",
        "data/megatron_format/mmistral_emoji_pack256/shard_0000{0,1,2} data/analysis/captions",
    )
    parser.add_argument(
        "indexed",
        nargs="+",
        help=f"{layout.Indexed.PATTERN}; or a tokenizer and {layout.Energon.PATTERN}",
    )
    parser.add_argument("analysis", help=layout.Analysis.PATTERN)
    parser.add_argument(
        "--workers",
        type=count,
        default=1,
        help="processes that tokenise samples of energon (default: %(default)s)",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the analysis and its manifest."""
    from plait.tokens import analysis

    target = layout.Analysis.parse(args.analysis)
    chosen = settings(args, target)
    with files.appears_whole(str(target), folder=True) as folder:
        if chosen["mixture"]["pack"]:
            inputs, facts = _packs(folder, target, args.indexed, chosen)
        else:
            inputs, facts = _samples(folder, target, args.indexed, chosen, args.workers)
        files.write_manifest(
            folder,
            kind="analysis",
            settings=chosen,
            inputs=map(str, inputs),
            facts=facts,
            unlisted=frozenset({analysis.PAGE, analysis.SHOWN}),
        )


Made = tuple[list[layout.Artifact], dict[str, Any]]
"""What an analysis is made from, and the facts of its manifest."""


def _packs(folder: Path, target: layout.Analysis, paths: Sequence[str], chosen: Mapping[str, Any]) -> Made:
    from plait.tokens import analysis, repeats
    from plait.tokens.page import look_at

    shards = [layout.Indexed.parse(str(one)) for one in layout.shards_of(paths)]
    counted = [analysis.measure(shard) for shard in shards]
    repeated = repeats.of_packs(folder, shards)
    look = look_at(counted, repeats.told(folder))
    facts = analysis.build(folder, target.mixture, counted, chosen["mixture"], look=look)
    return [*shards], {**facts, "duplicates": repeated}


def _samples(
    folder: Path, target: layout.Analysis, paths: Sequence[str], chosen: Mapping[str, Any], workers: int
) -> Made:
    from plait.tokens import samples

    tokenizer = layout.Tokenizer.parse(paths[0])
    datasets = [layout.Energon.parse(path) for path in paths[1:]]
    facts = samples.build(folder, target, Path(str(tokenizer)), datasets, chosen, workers)
    return [tokenizer, *datasets], facts
