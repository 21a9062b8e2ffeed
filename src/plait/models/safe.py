"""Headers of safetensors files: where each tensor stands, read and written without the tensors.

A file is the length of the header in 8 bytes, the header, which is JSON, and the tensors' bytes one after the
other. A header from anyone may say anything: what does not describe exactly the file's bytes is refused.
"""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError
from plait.models.stored import SIZES, Stored

TYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
CODES = {dtype: code for code, dtype in TYPES.items()}
LIMIT = 100_000_000
"""Bytes of a header that safetensors reads at most."""
ADVICE = "download or copy the file again"


def read(path: Path) -> dict[str, Stored]:
    """Where a file's tensors stand.

    Raises:
        CheckpointError: it is cut off, or its header does not describe it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(LIMIT, size - 8):
            raise _broken(path, f"its {size} bytes have no room for a header of {length}")
        header = _object(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    found = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, one in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if one.offset != end:
            raise _broken(path, f"{name} begins at byte {one.offset}, where the one before it ends at {end}")
        end += one.nbytes
    if end != size:
        raise _broken(path, f"its tensors end at byte {end}, and it has {size}")
    return found


def _object(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no object")
    return header


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = TYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} is of type {entry['dtype']!r}", hint=f"plait converts {', '.join(TYPES)}"
        )
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise _broken(path, f"{name} has the {what} {numbers!r}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        raise _broken(path, f"{name} of shape {shape} has the data_offsets {offsets}")
    return Stored(path, start + offsets[0], dtype, tuple(shape))


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is no whole safetensors file: {why}", hint=ADVICE)


def lay_out(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Stored]:
    """Make a file with room for tensors, by name, type and shape; where each stands.

    Its bytes are those of ``safetensors.torch.save_file`` once they are filled in.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    listed = list(tensors)
    for name, dtype, shape in sorted(listed, key=lambda one: (-SIZES[one[1]], one[0])):
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    start = 8 + len(text)
    return {
        name: Stored(path, start + header[name]["data_offsets"][0], dtype, tuple(shape))
        for name, dtype, shape in listed
    }
