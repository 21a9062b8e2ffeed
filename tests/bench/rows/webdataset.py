"""Webdataset tars for energon, written and prepared."""

import io
import json
import shutil
from contextlib import redirect_stdout
from functools import partial

from tests.bench.harness import Own, Row, processor
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


def loaded():
    """Ours; the peer's are not ours to have in memory."""
    from plait.data import energon  # noqa: F401


def built(source, target, count):
    """Ours."""
    from plait.data import energon

    energon.build(target, samples(source, count), KEYS)


def by_writer(source, target, count):
    """webdataset's ShardWriter, then `energon prepare`, as the converters of the field do.

    Modules are loaded before the clock starts, of which those of energon take longer than it needs for some
    thousand samples.
    """
    from megatron.energon.cli.main import main
    from webdataset import ShardWriter

    before = processor()
    with ShardWriter(f"{target}/%06d.tar", maxcount=KEYS["samples_per_shard"], verbose=0) as writer:
        for sample in samples(source, count):
            asked, answer = sample.messages
            turns = [
                {"from": "human", "value": f"<image>{asked.parts[1].text}"},
                {"from": "gpt", "value": answer.parts[0].text},
            ]
            writer.write({"__key__": sample.id, "jpg": sample.pictures[0], "json": turns})
    fields = '{"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"}'
    words = ["prepare", str(target), "--non-interactive", "--no-progress", "--num-workers", "1"]
    words += ["--split-ratio", "9,1,0", "--sample-type", "VQASample", "--field-map", fields]
    with redirect_stdout(io.StringIO()):
        main.main(words, standalone_mode=False)
    return Own(processor() - before)


def prepared(source, ours, peer, count):
    """Ours is what energon prepares of the same tars, and energon and webdataset read every sample of it."""
    from nv_meta import by_energon, compare, through_energon

    same = ours.with_name("same")
    try:
        by_energon(ours, KEYS, same)
        compare(ours, same)
    finally:
        shutil.rmtree(same)
    wanted = [sample.id for sample in samples(source, count)]
    assert [sample["__key__"] for sample in read(ours)] == wanted
    for one, other in zip(read(ours), read(peer), strict=True):
        assert all(one[part] == other[part] for part in ("__key__", "jpg"))
        assert json.loads(one["json"]) == json.loads(other["json"])
    assert sorted(through_energon(ours) + through_energon(ours, "val")) == wanted
    return f"{count:,} samples, .nv-meta as prepared"


def read(folder):
    """All samples of all tars, as webdataset reads them."""
    from webdataset import WebDataset

    return WebDataset(sorted(map(str, folder.rglob("*.tar"))), shardshuffle=False)


def row(name, count, side):
    makes = {"make": partial(jpegs, side=side, count=50), "check": partial(prepared, count=count)}
    ways = {"ours": partial(built, count=count), "peer": partial(by_writer, count=count)}
    return Row(name, target=3, **makes, **ways, warm=loaded)


ROWS = [row("webdataset-energon", 5_000, 640), row("webdataset-energon-more", 40_000, 336)]
