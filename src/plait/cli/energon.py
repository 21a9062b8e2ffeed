"""``plait energon``: webdataset shards of chat records, prepared for megatron-energon."""

import argparse
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings

if TYPE_CHECKING:
    from plait.data.chat import Sample
    from plait.data.rejects import Record


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "energon",
        "write chat records as webdataset tars and prepare them for megatron-energon",
        "data/processed/emoji/shard_0000{0,1,2}.jsonl.gz data/energon/emoji",
    )
    parser.add_argument("sources", nargs="+", help=f"{layout.Chat.PATTERN}, or one {layout.Raw.PATTERN}")
    parser.add_argument("target", help=layout.Energon.PATTERN)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the tars, what energon needs beside them, and the manifest."""
    from plait.data import energon, ledger

    target = layout.Energon.parse(args.target)
    chosen = settings(args, target)
    sources = tuple(Path(str(one)) for one in layout.shards_of(args.sources))
    with files.appears_whole(str(target), folder=True) as folder:
        if chosen["source"] and chosen["source"]["kind"] == "energon":
            raw = str(layout.Raw.parse(sources[0]))
            files.check_manifest(raw)
            facts = energon.adopt(folder, Path(raw), chosen["energon"])
        else:
            ledger.check_shares(sources)
            ends = list(accumulate(ledger.kept([shard]) for shard in sources))
            where = partial(_place, sources, ends)
            samples = _samples(sources, chosen.get("by_hash"))
            duplicates = chosen.get("duplicates", "count")
            facts = energon.build(folder, samples, chosen["energon"], where, duplicates)
            ledger.balance(f"chat -> energon, {target}", ledger.kept(sources), energon.outcomes(facts))
        files.write_manifest(
            folder, kind="energon", settings=chosen, inputs=sources, facts=facts, unlisted=UNLISTED
        )


def _samples(shards: Sequence[Path], by_hash: Mapping[str, Any] | None) -> "Iterator[Sample | None]":
    """The records of shards; of several datasets, each id under its dataset's name.

    Those of the other part are None: records are numbered with them.
    """
    from msgspec.structs import replace

    from plait.data import ledger, split
    from plait.data.shards import read

    names = [layout.Chat.parse(str(shard)).dataset for shard in shards]
    several = len(set(names)) > 1
    for name, shard in zip(names, shards, strict=True):
        for sample in ledger.counted(read(shard), shard, "energon"):
            named = replace(sample, id=f"{name}/{sample.id}") if several else sample
            yield named if split.takes(by_hash, sample.id) else None


def _place(shards: Sequence[Path], ends: Sequence[int], number: int) -> "Record":
    """Where the record of a number stands; ``ends`` are how many records the shards up to each have."""
    from plait.data.rejects import Record

    place = bisect_right(ends, number)
    return Record(shards[place], number - (ends[place - 1] if place else 0) + 1, "")


UNLISTED = frozenset({"index.uuid"})
"""Energon draws it anew in every preparation."""
