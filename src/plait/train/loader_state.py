"""The place of energon's loader in its data, as JSON: no pickle is written or read.

A state is nested lists, dictionaries and energon's own small classes, with the bytes of generators.
"""

import base64
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.energon import savable_loader
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.state import FlexState

from plait.errors import CheckpointError
from plait.layout import LOADER_FILES

CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        savable_loader.SavableDataLoaderState,
        savable_loader.SavableDatasetCheckpoint,
        savable_loader.SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}
"""The classes that a state may hold, by name."""
KIND = "__kind__"


def loader_file(stream: int) -> str:
    """The file of a stream's place in its data, by Megatron's name of a data parallel rank's."""
    return LOADER_FILES.replace("*", f"{stream:03d}")


def to_json(value: Any) -> Any:
    """A state as JSON values.

    Raises:
        CheckpointError: it holds something that no state of this energon had.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [to_json(one) for one in value]
    name = type(value).__name__
    if name not in WRITE:
        raise CheckpointError(f"energon's loader state holds a {name}, which plait cannot save")
    return {KIND: name, "of": to_json(WRITE[name](value))}


def from_json(value: Any) -> Any:
    """The state that :func:`to_json` wrote.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(value, list):
        return [from_json(one) for one in value]
    if not isinstance(value, dict):
        return value
    kind = str(value.get(KIND))
    if kind not in READ:
        raise CheckpointError(f"a loader state holds {kind!r}, which plait does not know")
    return READ[kind](from_json(value["of"]))


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _made(cls: type, fields: dict[str, Any]) -> Any:
    return cls(**fields)


def _array(of: list[Any]) -> Any:
    dtype, shape, content = of
    return np.frombuffer(content, dtype).reshape(shape)


WRITE: dict[str, Callable[[Any], Any]] = {
    "bytes": lambda value: base64.b64encode(value).decode(),
    "tuple": list,
    "dict": lambda value: [[key, one] for key, one in value.items()],
    "FlexState": lambda value: [[key, one] for key, one in value.items()],
    "Tensor": lambda value: value.numpy(),
    "ndarray": lambda value: [str(value.dtype), list(value.shape), value.tobytes()],
    **dict.fromkeys(CLASSES, _fields),
}
"""What a value is written as, by the name of its class: of its parts, each written in turn."""
READ: dict[str, Callable[[Any], Any]] = {
    "bytes": base64.b64decode,
    "tuple": tuple,
    "dict": dict,
    "FlexState": FlexState,
    "Tensor": lambda of: torch.from_numpy(of.copy()),
    "ndarray": _array,
    **{name: partial(_made, cls) for name, cls in CLASSES.items()},
}
"""The inverse of each."""
