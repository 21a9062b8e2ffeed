"""What is written beside tars of ours is, file by file, what ``energon prepare`` writes for them."""

import tarfile
from io import BytesIO
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nv_meta import by_energon, by_webdataset, compare, through_energon
from talks import KEYS, exchange, talk

from plait.data import energon, prepare, tars
from plait.data.tars import TarWriter
from plait.errors import DataError


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (exchange, {}),
        (talk, {"samples_per_shard": 3, "split": [0.5, 0.25, 0.25]}),
        (exchange, {"shard_name": "wds/pretrain-{}.tar", "samples_per_shard": 1, "split": [8, 1, 1]}),
        (exchange, {"layout": "question_answer", "exclude": r"00000[35]\.tar", "samples_per_shard": 2}),
        (exchange, {"split_parts": {"val": r"{000001,000003}\.tar", "train": r"00000[0245]\.tar"}}),
    ],
    ids=["ratio", "talks", "names-out-of-order", "excluded", "patterns"],
)
def test_it_is_what_energon_prepare_writes(tmp_path, make, keys, monkeypatch):
    settings = {**KEYS, **keys}
    folder = tmp_path / "ours"
    folder.mkdir()
    monkeypatch.setattr(prepare, "BATCH", 5)

    facts = energon.build(folder, map(make, range(24)), settings)

    by_energon(folder, settings, tmp_path / "theirs")
    compare(folder, tmp_path / "theirs")
    read = {part: sorted(through_energon(folder, part)) for part, count in facts["splits"].items() if count}
    assert {part: len(keys) for part, keys in read.items()} == {k: v for k, v in facts["splits"].items() if v}
    assert read == {part: sorted(one.id for one in energon.read(folder, part)) for part in read}
    assert sorted(by_webdataset(folder)) == sorted(make(number).id for number in range(24))


def test_the_version_is_the_pinned_one():
    pinned = Path("envs/cpu.in").read_text()
    assert f"megatron-energon=={prepare.ENERGON}\n" in pinned


NUMBERS = st.tuples(st.sampled_from(["a/{:02}.tar", "a/{}.tar", "b{:03}/{}.tar"]), st.integers(0, 12))


@given(st.lists(NUMBERS, max_size=30), st.integers(0, 12))
def test_names_collapse_as_energons_do(drawn, start):
    from braceexpand import braceexpand
    from megatron.energon.bracecollapse import collapse

    row = [("a/{:02}.tar", number) for number in range(start, start + 5)]
    names = [pattern.format(number, number + 1) for pattern, number in drawn + row]
    found = prepare.collapsed(names)
    assert found == collapse(names, keep_order=True)
    assert [one for name in found for one in braceexpand(name)] == names


@given(
    st.lists(st.floats(0, 9).map(lambda share: float(f"{share:g}")), min_size=3, max_size=3).filter(any),
    st.integers(1, 40),
)
@example([7, 2, 1], 10)
@example([0.7, 0.2, 0.1], 10)
def test_each_tar_is_dealt_out_once_and_in_order(split, count):
    names = [f"{number:02}.tar" for number in range(count)]
    found = prepare.dealt(names, {"split": split, "split_parts": {}})
    assert list(found) == ["train", "val", "test"]
    assert names == [*chain(*found.values())]


def test_shares_are_taken_as_they_are_written():
    names = [f"{number:02}.tar" for number in range(10)]
    for split in ([7, 2, 1], [0.7, 0.2, 0.1]):
        found = prepare.dealt(names, {"split": split, "split_parts": {}})
        assert [*map(len, found.values())] == [7, 2, 1]


def test_braces_that_are_none():
    with pytest.raises(DataError, match=r"split_parts has 'a\{1', which is no pattern"):
        prepare.dealt(["a"], {"split_parts": {"train": "a{1"}})


PART = st.sampled_from(["jpg", "json", "12.png", "txt"])


@given(
    st.lists(
        st.tuples(st.from_regex(r"[A-Za-z0-9_-]{1,80}", fullmatch=True), st.dictionaries(PART, st.binary())),
        max_size=8,
    )
)
def test_a_tar_is_plain_ustar(tmp_path_factory, samples):
    """Byte for byte what Python's tarfile writes, and each sample where it is said to be."""
    path, wanted = tmp_path_factory.mktemp("tar") / "d" / "a.tar", BytesIO()
    with tarfile.open(fileobj=wanted, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            for name, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    with TarWriter(path) as writer:
        entries = [writer.add(key, parts) for key, parts in samples]
    written = path.read_bytes()
    assert written == wanted.getvalue()
    for (_, parts), entry in zip(samples, entries, strict=True):
        assert {name: written[start : start + size] for name, start, size in entry.parts} == parts


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMED = st.one_of(
    st.from_regex(r"[a-z/]{1,120}\.(jpg|json)", fullmatch=True),
    st.sampled_from(["é.jpg", "\udcff.txt", "a b.txt"]),
)


@given(st.lists(st.tuples(NAMED, st.binary(), st.sampled_from("05")), max_size=6), st.sampled_from(FORMATS))
def test_entries_are_those_that_tarfile_finds(tmp_path_factory, drawn, form):
    """Whatever a header holds: names of any length and script, folders between files."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    try:
        with tarfile.open(path, "w", format=form) as tar:
            for name, content, kind in drawn:
                info = tarfile.TarInfo(name)
                info.size, info.type = len(content) if kind == "0" else 0, kind.encode()
                tar.addfile(info, BytesIO(content))
    except ValueError:  # a name that is too long for the format
        return
    with tarfile.open(path) as tar, path.open("rb") as file:
        wanted = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
        entries = tars._Entries(file, path)
        assert [*entries] == wanted
        assert entries.end == tar.offset
