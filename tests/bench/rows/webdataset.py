"""Webdataset tars for energon, written and prepared."""

import shutil
import subprocess
from functools import partial

from tests.bench.harness import Row
from tests.bench.rows.pictures import jpegs

KEYS = {
    "layout": "conversations", "shard_name": "{:06d}.tar", "samples_per_shard": 1250, "split": [9, 1, 0],
    "split_parts": {}, "exclude": "", "sample_type": None, "field_map": {}, "reject_limit": 0.01,
}  # fmt: skip


def samples(source, count):
    """Exchanges about pictures, of which each has other bytes."""
    from plait.data.chat import Message, Picture, Sample, Text

    encoded = [path.read_bytes() for path in sorted(source.glob("*.jpg"))]
    for number in range(count):
        shown = Picture(encoded[number % len(encoded)])
        user = Message("user", (shown, Text(f"\nwhat is {number}?")))
        yield Sample((user, Message("assistant", (Text(f"it is {number}"),))), f"s{number:06d}")


def built(source, target, count):
    """Ours."""
    from plait.data import energon

    energon.build(target, samples(source, count), KEYS)


def by_writer(source, target, count):
    """webdataset's ShardWriter, then `energon prepare`, as the converters of the field do."""
    from webdataset import ShardWriter

    with ShardWriter(f"{target}/%06d.tar", maxcount=KEYS["samples_per_shard"], verbose=0) as writer:
        for sample in samples(source, count):
            turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "it"}]
            writer.write({"__key__": sample.id, "jpg": sample.pictures[0], "json": turns})
    chosen = ["--non-interactive", "--split-ratio", "9,1,0", "--sample-type", "VQASample"]
    chosen += ["--force-overwrite", "--num-workers", "1"]
    fields = '{"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"}'
    command = [
        shutil.which("energon"),
        "prepare",
        str(target),
        *chosen,
        "--field-map",
        fields,
    ]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr


def prepared(source, ours, peer, count):
    """Ours is what energon prepares of the same tars, and energon and webdataset read every sample of it."""
    from nv_meta import by_energon, by_webdataset, compare, through_energon

    same = ours.with_name("same")
    try:
        by_energon(ours, KEYS, same)
        compare(ours, same)
    finally:
        shutil.rmtree(same)
    wanted = [sample.id for sample in samples(source, count)]
    assert by_webdataset(ours) == by_webdataset(peer) == wanted
    assert sorted(through_energon(ours) + through_energon(ours, "val")) == wanted
    return f"{count:,} samples, .nv-meta as prepared"


def row(name, count, side):
    makes = {"make": partial(jpegs, side=side, count=50), "check": partial(prepared, count=count)}
    ways = {"ours": partial(built, count=count), "peer": partial(by_writer, count=count)}
    return Row(name, target=3, **makes, **ways)


ROWS = [row("webdataset-energon", 5_000, 640), row("webdataset-energon-more", 40_000, 336)]
