"""Weights in the older format of PyTorch, as ``pytorch_model.bin``: read without running what they ask for.

Such a file is a pickle, which may name any function to call. Only PyTorch's restricted reader is used: it
makes tensors and plain containers and refuses all else. Tensors are mapped from the file, not copied.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import CheckpointError

BROKEN = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, MemoryError,
)  # fmt: skip
"""What PyTorch's reader raises on changed bytes: it checks what it makes, not that the stream makes sense."""
ADVICE = "save the model with safe_serialization=True, or name a copy with safetensors"


class Pickled:
    """A file of tensors by name, asked as an open safetensors file is."""

    def __init__(self, path: Path) -> None:
        """Map it.

        Raises:
            CheckpointError: it is cut off, of the format before PyTorch 1.6, or holds more than tensors.
        """
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except BROKEN as error:
            words = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
            raise CheckpointError(
                f"{path} cannot be read as tensors alone, and nothing in it is run: {words}", hint=ADVICE
            ) from error
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{path} holds a {type(found).__name__}, not tensors by name", hint=ADVICE)
        for name, tensor in found.items():
            if not isinstance(name, str) or not _plain(tensor):
                raise CheckpointError(f"{path}: {name!r} is no dense tensor of numbers", hint=ADVICE)
        self._tensors: dict[str, Tensor] = found

    def keys(self) -> list[str]:
        """The names."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name].detach()

    def get_slice(self, name: str) -> "Shape":
        """What tells its shape."""
        return Shape(tuple(self._tensors[name].shape))


class Shape(tuple[int, ...]):
    """A shape, asked as a slice of safetensors is."""

    __slots__ = ()

    def get_shape(self) -> tuple[int, ...]:
        """Itself."""
        return self


def _plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
