"""What records are compared by is made with them, and is what their lines say."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import tokenizer_folder
from hypothesis import given
from hypothesis import strategies as st

from plait import files, layout
from plait.config.model import load
from plait.config.plan import Plan
from plait.data import chat, prints, said, shards, sources
from plait.data.chat import SAMPLES, Message, Picture, Sample, Text
from plait.errors import DataError, RecordError
from plait.tokens import build

FORM = {
    "template": "pretrain", "packing": "best_fit", "overlong": "split", "pictures": "encoded",
    "patch_size": 32, "max_resolution": 1024, "reject_limit": 0.5, "no_loss": "count",
}  # fmt: skip
PARTS = st.one_of(st.builds(Text, st.text(max_size=9)), st.builds(Picture, st.binary(min_size=1, max_size=9)))
MESSAGES = st.builds(Message, st.sampled_from(chat.ROLES), st.lists(PARTS, max_size=4).map(tuple))


@given(st.lists(MESSAGES, min_size=1, max_size=4).map(tuple).map(Sample))
def test_a_sample_has_the_rows_of_what_its_line_says(sample):
    line = sample.to_line("x")
    try:
        read = chat.parse(line)
    except RecordError:
        return
    assert said.rows([sample], [line]).tobytes() == said.rows([read], [line]).tobytes()


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """A shard of a dataset of so many records, in the working folder."""
    monkeypatch.chdir(tmp_path)

    def made(count):
        talks = [
            [
                {"role": "user", "content": f"{number} ßé"},
                {"role": "assistant", "content": f"so {number % 50}"},
            ]
            for number in range(count)
        ]
        Path("x.jsonl").write_text("".join(json.dumps(one) + "\n" for one in talks))
        plan = Plan(load({"datasets": {"toy": {"source": {"kind": "chat-jsonl", "path": "x.jsonl"}}}}))
        raw, target = layout.Raw(dataset="toy"), layout.Chat(dataset="toy", shard=0)
        with files.appears_whole(str(raw), folder=True) as folder:
            facts = sources.make(plan.settings(raw)["source"], folder)
            files.write_manifest(folder, kind="raw", settings={}, facts=facts)
        shards.write(Path(str(raw)), target, plan.settings(target))
        return Path(str(target))

    return made


def test_a_shard_has_a_row_for_each_line(shard):
    path = shard(SAMPLES * 3 + 5)
    lines = gzip.decompress(path.read_bytes()).splitlines()
    expected = said.rows([*shards.read(path)], lines)
    assert Path(layout.said_of(str(path))).read_bytes() == expected.tobytes()
    assert len({*expected["digest"].tolist()}) == len(expected) == len(lines)


def test_few_records_have_none_and_a_shard_made_again_has_none_of_before(shard):
    path = shard(SAMPLES)
    assert Path(layout.said_of(str(path))).is_file()
    files.remove(Path("data/raw/toy"))
    assert not Path(layout.said_of(str(shard(SAMPLES - 1)))).exists()


def test_samples_are_held_until_they_are_many_or_large(shard, monkeypatch):
    path = shard(SAMPLES * 2 + 1)
    rows = Path(layout.said_of(str(path))).read_bytes()
    sizes, looked_at = [], said.rows
    monkeypatch.setattr(said, "rows", lambda *args: sizes.append(len(args[0])) or looked_at(*args))
    monkeypatch.setattr(chat, "BYTES", 1000)
    files.remove(Path("data/raw/toy"))

    shard(SAMPLES * 2 + 1)

    assert 1 < max(sizes) < SAMPLES
    assert Path(layout.said_of(str(path))).read_bytes() == rows


@pytest.mark.parametrize("known", [0, 1, SAMPLES * 2 + 1])
def test_what_is_not_known_of_samples_is_looked_at_some_at_a_time(monkeypatch, known):
    samples = [(Sample((Message("user", (Text(f"This is {n}."),)),)), str(n)) for n in range(SAMPLES * 2 + 1)]
    expected = prints.rows(samples)
    there = [one.tobytes() for one in said.rows([one for one, _ in samples])]
    sizes, looked_at = [], said.rows
    monkeypatch.setattr(said, "rows", lambda some: sizes.append(len(some)) or looked_at(some))

    found = prints.rows(samples, there[:known] + [None] * (len(there) - known))

    assert sizes == ([] if known == len(samples) else [SAMPLES, SAMPLES, 1])
    assert found.tobytes() == expected.tobytes()
    assert len({*found["text"].tolist()}) == len(samples)


@pytest.mark.parametrize("which", [slice(None), np.array([2, 0])])
def test_prints_that_are_cut_while_they_are_read_are_named(tmp_path, which):
    with prints.Prints(tmp_path) as out:
        out.extend(np.zeros(3, prints.ROW), ["a", "b", "c"])
    found = prints.Printed(tmp_path)
    assert len(found[which]) > 1
    os.truncate(tmp_path / "data-prints.bin", 3 * prints.ROW.itemsize - 1)

    assert len(found[:2]) == 2
    with pytest.raises(DataError, match=r"data-prints\.bin has fewer than the 3 rows that it had"):
        found[which]


def test_half_a_pair_of_surrogates_is_not_written():
    with pytest.raises(RecordError, match="cannot be written in UTF-8") as caught:
        Sample((Message("assistant", (Text("\ud83d"),)),)).to_line("x")
    assert caught.value.reason == "not_text"


def packed(path, target):
    tokenizer = path.parent / "tokenizer"
    if not tokenizer.exists():
        tokenizer_folder(tokenizer)
    target.mkdir()
    return build.build(target, tokenizer, [path], FORM | {"tokenizer": "byte"}, 512, {"duplicates": "reject"})


def test_an_index_is_the_same_with_and_without_the_rows(shard, tmp_path):
    path = shard(SAMPLES * 2 + 1)
    facts = packed(path, tmp_path / "with")
    Path(layout.said_of(str(path))).unlink()
    assert packed(path, tmp_path / "without") == facts
    names = {one.name for one in (tmp_path / "with").iterdir()}
    assert names == {one.name for one in (tmp_path / "without").iterdir()}
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def one_changed(lines):
    return [lines[0].replace(b"so", b"si"), *lines[1:]]


@pytest.mark.parametrize("change", [one_changed, lambda lines: lines[:-1], lambda lines: [*lines, lines[0]]])
def test_rows_of_other_records_are_refused(shard, tmp_path, change):
    path = shard(SAMPLES * 2)
    lines = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"".join(line + b"\n" for line in change(lines))))
    with pytest.raises(DataError, match=r"shard_00000\.said is not of the records beside it") as caught:
        packed(path, tmp_path / "i")
    assert "remove that file" in caught.value.hint
    shutil.rmtree(tmp_path / "i")
    Path(layout.said_of(str(path))).unlink()
    assert packed(path, tmp_path / "i")["read"] >= len(lines) - 1


@pytest.mark.parametrize("left", [4, said.ROW.itemsize - 1])
def test_a_last_row_that_is_cut_short_is_refused(shard, tmp_path, left):
    path = shard(SAMPLES * 2)
    rows = Path(layout.said_of(str(path)))
    content = rows.read_bytes()
    rows.write_bytes(content[: len(content) - said.ROW.itemsize + left])
    with pytest.raises(DataError, match=r"shard_00000\.said is not of the records beside it"):
        packed(path, tmp_path / "i")


def test_each_number_of_a_row_is_in_its_place():
    sample = Sample((Message("user", (Text("abc"),)),))
    row = said.rows([sample], [b"123456789"])
    assert row["line"] == 0xCBF43926  # the check value of CRC-32
    assert row.tobytes()[said.DIGEST] == said.digest(sample)
    assert np.any(row["pieces"])
