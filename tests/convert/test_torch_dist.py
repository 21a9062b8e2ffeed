"""The metadata of a checkpoint is a pickle from who knows whom."""

import io
import pickle
import pickletools

import pytest
import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as theirs
from torch.distributed.checkpoint.planner import WriteItemType

from plait.convert import metadata
from plait.convert.metadata import Chunk, Entry, Location
from plait.convert.torch_dist import METADATA, TorchDist
from plait.errors import CheckpointError

AT = b"torch.distributed.checkpoint."
ENUM = b"cbuiltins\ngetattr\n(c" + AT + b"planner\nWriteItemType\nV%s\ntR."
KINDS = ["Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"]


def read(folder, content):
    (folder / METADATA).write_bytes(content)
    return TorchDist(folder).metadata


def stored(size=(4, 2), boxes=(((0, 0), (2, 2)), ((2, 0), (2, 2))), place=("a.distcp", 0, 9), **more):
    """Torch's own metadata of one tensor and of bytes."""
    chunks = [theirs.ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
    entry = theirs.TensorStorageMetadata(theirs.TensorProperties(torch.bfloat16), torch.Size(size), chunks)
    places = {
        theirs.MetadataIndex("w", one.offsets, number): filesystem._StorageInfo(*place)
        for number, one in enumerate(chunks)
    } | {theirs.MetadataIndex("b"): filesystem._StorageInfo("b.distcp", 0, 1)}
    plan = planner.SavePlan([planner.WriteItem(theirs.MetadataIndex("b"), WriteItemType.BYTE_IO)])
    return theirs.Metadata(
        {"w": entry, "b": theirs.BytesStorageMetadata()}, [plan], places, theirs.StorageMeta("here"), **more
    )


def test_what_torch_writes_is_read(tmp_path):
    found = read(tmp_path, pickle.dumps(stored()))
    boxes = Chunk((0, 0), (2, 2)), Chunk((2, 0), (2, 2))
    assert found.entries == {"w": Entry((4, 2), boxes), "b": Entry(None)}
    assert found.locations == {
        **{("w", box.offsets): Location("a.distcp", 0, 9, is_plain=True) for box in boxes},
        ("b", None): Location("b.distcp", 0, 1, is_plain=True),
    }


def test_a_member_of_an_enum_is_read_as_every_python_3_11_writes_it():
    for content in (ENUM % b"TENSOR", pickle.dumps(WriteItemType.TENSOR)):
        assert isinstance(metadata._Unpickler(io.BytesIO(content)).load(), metadata.Inert)


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(Vtrue\ntR.",
        b"cbuiltins\neval\n(V1\ntR.",
        b"cbuiltins\ngetattr\n(c" + AT + b"metadata\nMetadata\nV__init__\ntR.",
        ENUM % b"__class__",
        pickle.dumps({"a": 1})[:-3],
        pickle.dumps({}),
        b"(lr\xff\xff\xff\x7f.",
        b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.",
        b"\x8c\x02\xff\xfe.",
    ],
)
def test_nothing_else_is_called(tmp_path, content):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path, content)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [b"}V__eq__\nNsb", b"N}V__eq__\nNs\x86b", b"V__eq__\nNs", b"Nc" + AT + b"metadata\nMetadata\n\x86b"],
    ids=["its dictionary", "its slots", "an item", "another class"],
)
def test_a_pickle_changes_no_class(tmp_path, kind, change):
    """BUILD sets attributes on whatever stands before it, a class too."""
    own = [one for group in metadata.STAND_INS.values() for one in group.values()]
    before = [dict(vars(one)) for one in (*own, *vars(theirs).values()) if isinstance(one, type)]
    content = b"\x80\x02c" + AT + b"metadata\n" + kind.encode() + b"\n" + change + b"."
    pickletools.dis(content, out=io.StringIO())  # it is a whole pickle
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path, content)
    after = [dict(vars(one)) for one in (*own, *vars(theirs).values()) if isinstance(one, type)]
    assert before == after


def test_no_code_of_torch_is_run(tmp_path, monkeypatch):
    """Its __setstate__ neither: what it would raise is not raised."""
    content = pickle.dumps(stored())
    for name in KINDS:
        monkeypatch.delattr(theirs, name)
    assert read(tmp_path, content).entries["w"].size == (4, 2)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"boxes": [((3, 0), (2, 2))]}, "a chunk of w does not lie in its"),
        ({"boxes": [((0,), (2,))]}, "a chunk of w does not lie in its"),
        ({"boxes": [((-1, 0), (2, 2))]}, "the offsets of a chunk of w is no row of sizes"),
        ({"size": (-4, 2)}, "the size of w is no row of sizes"),
        ({"place": ("a.distcp", -1, 9)}, "the place of w is no row of sizes"),
        ({"place": ("a.distcp", 0, 9.5)}, "the place of w is no row of sizes"),
        ({"place": (7, 0, 9)}, "the file of w is no str"),
        ({"place": ("a.distcp", True, 9)}, "the place of w is no row of sizes"),
    ],
)
def test_numbers_that_cannot_be_are_told_with_the_tensor(tmp_path, keys, sentence):
    with pytest.raises(CheckpointError, match=rf"\.metadata cannot be read: {sentence}"):
        read(tmp_path, pickle.dumps(stored(**keys)))


def test_a_chunk_outside_the_folder_or_transformed_is_not_read(tmp_path):
    for place in (("../a.distcp", 0, 9), ("a.distcp", 0, 9, ["zstd"])):
        (tmp_path / METADATA).write_bytes(pickle.dumps(stored(place=place)))
        with pytest.raises(CheckpointError, match="w is stored in a way that plait does not read"):
            TorchDist(tmp_path).chunk("w", Chunk((0, 0), (2, 2)))
