import os
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from plait.errors import DataError
from plait.tokens.indexed import CODES, IndexedReader, IndexedWriter, index_size, text_dtype

ITEMS = st.sampled_from(sorted(CODES)).flatmap(
    lambda dtype: st.lists(
        st.lists(
            arrays(dtype, st.integers(0, 9), elements={"allow_nan": False} if "f" in dtype else None),
            max_size=3,
        ),
        max_size=6,
    ).map(lambda documents: (dtype, documents))
)


def write(prefix, dtype, documents):
    with IndexedWriter(prefix, dtype) as writer:
        for items in documents:
            writer.document(*items)


@settings(deadline=None)
@given(case=ITEMS)
def test_what_is_written_is_read(tmp_path_factory, case):
    dtype, documents = case
    prefix = tmp_path_factory.mktemp("indexed") / "data"

    write(prefix, dtype, documents)
    reader = IndexedReader(prefix)

    assert reader.dtype == dtype
    assert reader.documents == len(documents)
    for number, items in enumerate(documents):
        found = reader.document(number)
        assert len(found) == len(items)
        assert all(np.array_equal(a, b) for a, b in zip(found, items, strict=True))
    assert len(reader) == sum(map(len, documents))


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_files_are_those_of_megatron_core_byte_for_byte(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    values = np.random.default_rng(0)
    sizes = [[3], [], [5, 0, 1], [7]]
    documents = [[values.integers(0, 100, size).astype(dtype) for size in items] for items in sizes]
    write(tmp_path / "ours", dtype, documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for items in documents:
        for item in items:
            builder.add_item(torch.from_numpy(item.astype(np.float64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))

    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    opened = IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(opened[n], item) for n, item in enumerate(chain.from_iterable(documents)))
    assert opened.document_indices.tolist() == [0, 1, 1, 4, 5]


def test_an_index_has_the_size_its_documentation_says(tmp_path):
    write(tmp_path / "data", np.uint16, [[np.arange(3)]] * 7)

    assert (tmp_path / "data.idx").stat().st_size == index_size(items=7, documents=7)


def test_token_ids_take_two_bytes_where_the_vocabulary_allows():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (32000, 65499, 65500, 128256):
        assert text_dtype(size) == DType.optimal_dtype(size)


def test_an_error_while_writing_leaves_no_index(tmp_path):
    with pytest.raises(AttributeError):
        write(tmp_path / "data", np.uint8, [[b"abc"], [None]])

    assert not (tmp_path / "data.idx").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.with_suffix(".bin").write_bytes(b"short"), "has 5 bytes, its index says 12"),
        (lambda p: p.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00"), "is not an index"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-1]),
            "expected version 1",
        ),
        (lambda p: p.with_suffix(".bin").unlink(), "does not exist"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, words):
    prefix = tmp_path / "data"
    write(prefix, np.uint16, [[np.arange(6)]])
    damage(prefix)

    with pytest.raises(DataError, match=words):
        IndexedReader(prefix)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    write(tmp_path / "data", np.uint16, [[np.arange(6)], [np.arange(6)]])
    reader = IndexedReader(tmp_path / "data")
    os.truncate(tmp_path / "data.bin", 22)

    assert reader[0].tolist() == [*range(6)]
    with pytest.raises(DataError, match=r"data\.bin ends within the 12 bytes from 12 on; it had 24"):
        reader[1]
    with pytest.raises(DataError, match=r"data\.bin ends within the 24 bytes from 0 on"):
        list(reader.stretches())
