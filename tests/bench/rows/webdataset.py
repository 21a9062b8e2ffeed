"""Webdataset tars for energon, written and prepared."""

import shutil
import subprocess
from functools import partial

from tests.bench.harness import Row
from tests.bench.rows.pictures import jpegs

COUNT = 5000
KEYS = {
    "layout": "conversations", "shard_name": "{:06d}.tar", "samples_per_shard": 1250, "split": [9, 1, 0],
    "split_parts": {}, "exclude": "", "sample_type": None, "field_map": {}, "reject_limit": 0.01,
}  # fmt: skip


def samples(source):
    """Exchanges about pictures, of which each has other bytes."""
    from plait.data.chat import Message, Picture, Sample, Text

    encoded = [path.read_bytes() for path in sorted(source.glob("*.jpg"))]
    for number in range(COUNT):
        shown = Picture(encoded[number % len(encoded)])
        user = Message("user", (shown, Text(f"\nwhat is {number}?")))
        yield Sample((user, Message("assistant", (Text(f"it is {number}"),))), f"s{number:06d}")


def built(source, target):
    """Ours."""
    from plait.data import energon

    energon.build(target, samples(source), KEYS)


def by_writer(source, target):
    """webdataset's ShardWriter, then `energon prepare`, as the converters of the field do."""
    from webdataset import ShardWriter

    with ShardWriter(f"{target}/%06d.tar", maxcount=KEYS["samples_per_shard"], verbose=0) as writer:
        for sample in samples(source):
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


def prepared(source, ours, peer):
    for one in (ours, peer):
        assert (one / ".nv-meta" / "index.sqlite").stat().st_size > 1000
        assert len(list(one.glob("*.tar.idx"))) == COUNT // KEYS["samples_per_shard"]
    return f"{COUNT} samples"


ROWS = [
    Row(
        "webdataset-energon",
        target=3,
        make=partial(jpegs, side=640, count=50),
        ours=built,
        peer=by_writer,
        check=prepared,
    )
]
