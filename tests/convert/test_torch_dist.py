"""The metadata of a checkpoint is a pickle from who knows whom."""

import io
import pickle

import pytest
from torch.distributed.checkpoint.planner import WriteItemType

from plait.convert import torch_dist
from plait.convert.torch_dist import METADATA, TorchDist
from plait.errors import CheckpointError

ENUM = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.planner\nWriteItemType\nV%s\ntR."


def metadata(folder, content):
    (folder / METADATA).write_bytes(content)
    return TorchDist(folder).metadata


def test_a_member_of_an_enum_is_read_as_every_python_3_11_writes_it():
    for content in (ENUM % b"TENSOR", pickle.dumps(WriteItemType.TENSOR)):
        assert torch_dist._Unpickler(io.BytesIO(content)).load() is WriteItemType.TENSOR


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(Vtrue\ntR.",
        b"cbuiltins\neval\n(V1\ntR.",
        b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nV__init__\ntR.",
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
        metadata(tmp_path, content)
