"""A GGUF file of llama.cpp as a Hugging Face folder: unpacked, renamed, its rotated rows put back."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from plait.config.gguf import GgufModel
from plait.config.paths import local
from plait.errors import CheckpointError
from plait.fetch.lfs import refuse_pointers
from plait.models.gguf import tokenizer
from plait.models.gguf.header import Header, broken, read
from plait.models.gguf.tables import config_of, heads_of, names_of
from plait.models.hub import as_fetched
from plait.models.link import check_and_complete
from plait.models.specs import Spec
from plait.models.stored import Stored, write_from
from plait.models.weights import FolderTensors, check_shapes, config_text, lay_out, write_down

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
BLOCK = 1 << 24
"""Numbers that are unpacked at once."""

log = logging.getLogger(__name__)


def gguf(folder: Path, settings: GgufModel) -> dict[str, Any]:
    """Write the model of a file into an empty folder; the facts of its manifest.

    Raises:
        CheckpointError: there is no such file, it is not whole, or is of a kind that plait does not read.
        DataError: it was not fetched, or is a pointer of git LFS.
    """
    path = as_fetched(settings.place) if settings.place else local(settings.path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no file", hint="raw_hf.*.path names a .gguf file")
    refuse_pointers([path])
    header = read(path)
    config = config_of(header, DTYPES[settings.dtype])
    spec, names = Spec.from_config(config, where=str(path)), names_of(header)
    if spec.head_dim % 2:
        raise broken(path, f"its heads of {spec.head_dim} features cannot be rotated")
    shapes = {name: header.tensors[own].shape for name, own in names.items()}
    check_shapes(shapes, spec.shapes, str(path))
    (folder / "config.json").write_text(config_text(config), encoding="utf-8")
    tokenizer.save(header, folder)
    for name, stored in lay_out(folder, dict.fromkeys(shapes, spec.dtype), spec.shapes).items():
        write(header, names[name], stored, config)
    tensors = FolderTensors(folder)
    check_and_complete(folder, folder, tensors)
    kinds = sorted({one.kind.name for one in header.tensors.values()})
    log.info("%s: %d tensors of %s as %s", path.name, len(tensors), ", ".join(kinds), settings.dtype)
    return write_down(tensors)


def write(header: Header, name: str, stored: Stored, config: Mapping[str, Any]) -> None:
    """Unpack a tensor into its place, so many rows at once that memory does not depend on its size."""
    packed = header.tensors[name]
    rows = in_halves(packed.rows(), heads_of(name, config))
    step, offset = max(1, BLOCK // packed.shape[-1]), stored.offset
    with stored.path.open("r+b") as file:
        for first in range(0, len(rows), step):
            numbers = torch.from_numpy(packed.unpacked(rows[first : first + step]))
            content = numbers.to(getattr(torch, stored.dtype)).flatten().view(torch.uint8).numpy().data
            write_from(file.fileno(), offset, content)
            offset += len(content)


def in_halves(rows: "NDArray[np.uint8]", heads: int) -> "NDArray[np.uint8]":
    """Rows of queries or keys in Hugging Face's order, from llama.cpp's.

    A rotation turns two features of a head at once: features 2i and 2i + 1 in llama.cpp, i and i + half of
    the head in transformers. Blocks lie along a row, so rows move packed.

    Args:
        rows: as they are in the file.
        heads: how many heads they are of; 0: none is rotated.
    """
    if not heads:
        return rows
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
