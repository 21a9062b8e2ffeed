"""What identifies each tensor of a model, the leaves of its Merkle root; kept beside its files."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plait.files import canonical, read_object, write_json
from plait.layout import TENSORS


class Leaf(NamedTuple):
    """What identifies a tensor: its type, shape, and the sha256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def root(leaves: Mapping[str, Leaf]) -> str:
    """The Merkle root of a model: equal roots mean bit-equal models; files, order and grid do not enter."""
    listed = sorted([name, leaf.dtype, list(leaf.shape), leaf.sha256] for name, leaf in leaves.items())
    return hashlib.sha256(canonical(listed).encode()).hexdigest()


def write_leaves(folder: Path, leaves: Mapping[str, Leaf]) -> str:
    """Write down a model's tensors, beside the files that hold it; its root.

    A link that stands there is replaced, and what it leads to stays as it is.
    """
    write_json(folder / TENSORS, to_json(leaves))
    return root(leaves)


def read_leaves(folder: Path) -> dict[str, Leaf]:
    """The tensors that a folder's model had when it was made.

    Raises:
        DataError: they were not written down.
    """
    return from_json(read_object(folder / TENSORS))


def to_json(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """Tensors as JSON has them."""
    return {name: [one.dtype, list(one.shape), one.sha256] for name, one in leaves.items()}


def from_json(found: Mapping[str, Any]) -> dict[str, Leaf]:
    """What :func:`to_json` made JSON of."""
    return {name: Leaf(dtype, tuple(shape), sha256) for name, (dtype, shape, sha256) in found.items()}
