"""A model from files to files, box by box: memory does not grow with it, and its digests cost no second read.

Each Hugging Face tensor passes through a buffer of a few rows: its boxes are read from wherever they stand,
digested, and written to wherever they go. Sources and targets say so by their forms, whatever their formats
and grids. The plan is checked first, from metadata alone.
"""

import hashlib
import os
import resource
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from plait.convert import forms
from plait.convert.forms import Move, Sources
from plait.convert.ops import Held, Piece, Shape, matrix
from plait.errors import CheckpointError
from plait.models.archive import Strided
from plait.models.leaves import Leaf
from plait.models.stored import SIZES, Stored, read_into, write_from

BLOCK = 1_000_000
"""Bytes of a tensor in memory at a time: few enough to stay in the cache between reading and writing."""
THREADS = 2
SPARE = 128
"""Files that a process has open besides those of the model."""

Bytes = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
"""Rows of a tensor, as bytes."""


@dataclass(frozen=True)
class Placed:
    """A tensor in a file, and what it holds of a model.

    Attributes:
        name: its name there, for a reader.
        stored: where it stands.
        held: what it is made of.
    """

    name: str
    stored: Stored
    held: Held


def type_of(name: str, pieces: Iterable[Piece], dtypes: Mapping[str, str]) -> str:
    """The one type of the boxes of a tensor.

    Raises:
        CheckpointError: they have several.
    """
    found = sorted({dtypes[piece.hf] for piece in pieces})
    if len(found) > 1:
        raise CheckpointError(f"{name} is made of {' and '.join(found)}; a tensor has one type")
    return found[0]


class Model:
    """A Hugging Face model, whatever files it stands in."""

    def __init__(self, sources: Sequence[Placed], shapes: Mapping[str, Shape]) -> None:
        """Plan how it is read.

        Args:
            sources: where it stands.
            shapes: its tensors.

        Raises:
            CheckpointError: an element is missing or stands twice, or a tensor has several types.
        """
        for one in sources:
            _check(one)
        self.files = sorted({one.stored.path for one in sources})
        try:
            forms.check_once((one.held for one in sources), shapes)
        except CheckpointError as error:
            place = os.path.commonpath(self.files) if self.files else "no file"
            raise CheckpointError(f"{place}: {error.args[0]}", hint=error.hint) from error
        self.shapes = dict(shapes)
        self.dtypes: dict[str, str] = {}
        for one in sources:
            for piece in one.held.pieces:
                known = self.dtypes.setdefault(piece.hf, one.stored.dtype)
                if known != one.stored.dtype:
                    raise CheckpointError(
                        f"{one.stored.path}: {one.name} has {piece.hf} as {one.stored.dtype}, not {known}"
                    )
        self._index = Sources((one, one.held) for one in sources)

    def stream(
        self,
        targets: Sequence[Placed] = (),
        *,
        digests: bool = True,
        rounded: Mapping[str, Leaf] | None = None,
        only: Sequence[str] | None = None,
    ) -> dict[str, Leaf]:
        """Write the model where ``targets`` say, and digest it as it passes.

        Args:
            targets: where it goes; nowhere, where there are none.
            digests: whether the sha256 of tensors are wanted.
            rounded: what each tensor must be in another type.
            only: some of its tensors; None is all. Targets are checked whole in any case.

        Raises:
            CheckpointError: targets do not take each element once, with its type; copies of a tensor differ,
                or one is not what it must be rounded; or a file is cut off.
        """
        if targets:
            self.check(targets)
        index = Sources((one, one.held) for one in targets)
        with _Files(self.files) as read, _Files({one.stored.path for one in targets}, write=True) as written:
            one = _Pass(self, index, read, written, digests=digests, rounded=rounded or {})
            names = list(self.shapes) if only is None else only
            with ThreadPoolExecutor(THREADS) as pool:
                leaves = list(pool.map(one, names))
        return dict(zip(names, leaves, strict=True))

    def check(self, targets: Sequence[Placed]) -> None:
        """Check that targets take each element once, with its type; nothing is read or written.

        Raises:
            CheckpointError: they do not.
        """
        forms.check_once((one.held for one in targets), self.shapes)
        for one in targets:
            for piece in one.held.pieces:
                if self.dtypes[piece.hf] != one.stored.dtype:
                    raise CheckpointError(
                        f"{one.name} is {one.stored.dtype}, {piece.hf} in it is {self.dtypes[piece.hf]}"
                    )

    def moves(self, name: str) -> list[Move]:
        """Where the boxes of a tensor stand."""
        return list(self._index.moves(forms.identity({name: self.shapes[name]})[name]))

    def tensor(self, name: str) -> Tensor:
        """Read one.

        Raises:
            CheckpointError: copies of it differ, or a file is cut off.
        """
        shape, dtype = self.shapes[name], getattr(torch, self.dtypes[name])
        rows, cols = matrix(shape)
        found = torch.empty(shape, dtype=dtype)
        size = found.element_size()
        if found.numel():
            room = found.reshape(rows, cols).view(torch.uint8).numpy()
            moves = sorted(self.moves(name), key=lambda one: one.copy)
            with _Files({move.source.stored.path for move in moves}) as read:
                for move in moves:
                    _fetch(move, room, 0, rows, size, read, name)
        return found


class View(Mapping[str, Tensor]):
    """A model's tensors, each read when it is asked for."""

    def __init__(self, model: Model) -> None:
        """Take the model."""
        self.model = model

    def __getitem__(self, name: str) -> Tensor:
        return self.model.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.shapes)

    def __len__(self) -> int:
        return len(self.model.shapes)


class _Files:
    """Open files by path."""

    def __init__(self, paths: Iterable[Path], *, write: bool = False) -> None:
        # Never O_RDWR: NFS would write whole pages back, over what another host has written of them.
        self._paths, self._flags, self._stack = paths, os.O_WRONLY if write else os.O_RDONLY, ExitStack()

    def __enter__(self) -> Self:
        paths = list(self._paths)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < len(paths) + SPARE:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, len(paths) + 2 * SPARE), hard))
        self.open: dict[Path, int] = {}
        for path in paths:
            self.open[path] = os.open(path, self._flags)
            self._stack.callback(os.close, self.open[path])
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Pass:
    """Takes one tensor after the other through a thread's buffer."""

    def __init__(
        self,
        model: Model,
        targets: Sources,
        read: _Files,
        written: _Files,
        *,
        digests: bool,
        rounded: Mapping[str, Leaf],
    ) -> None:
        self.model, self.targets, self.read, self.written = model, targets, read, written
        self.digests, self.rounded, self._own = digests, rounded, threading.local()

    def __call__(self, name: str) -> Leaf:
        """Read, digest and write a tensor."""
        shape, dtype = self.model.shapes[name], self.model.dtypes[name]
        size, (rows, cols) = SIZES[dtype], matrix(shape)
        sources = sorted(self.model.moves(name), key=lambda one: one.copy)
        targets = list(self.targets.moves(forms.identity({name: shape})[name]))
        sha, other, other_sha = hashlib.sha256(), self.rounded.get(name), hashlib.sha256()
        step = max(1, BLOCK // max(1, cols * size))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            room = self._room((stop - start) * cols * size).reshape(stop - start, cols * size)
            for move in sources:
                _fetch(move, room, start, stop, size, self.read, name)
            if self.digests:
                sha.update(room.data)
            if other:
                other_sha.update(_rounded(room, dtype, other.dtype).data)
            for move in targets:
                _deliver(move, room, start, stop, size, self.written)
        if other and other_sha.hexdigest() != other.sha256:
            path = self.model.moves(name)[0].source.stored.path
            raise CheckpointError(
                f"{path}: {name} in {dtype} does not round to the {other.dtype} weight",
                hint="weights and optimizer are of different iterations, or in different orders",
            )
        return Leaf(dtype, shape, sha.hexdigest() if self.digests else "")

    def _room(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        room = getattr(self._own, "room", None)
        if room is None or len(room) < size:
            room = self._own.room = np.empty(size, dtype=np.uint8)
        return room[:size]


def _rounded(room: Bytes, dtype: str, other: str) -> Bytes:
    """The same rows in another type."""
    rows = torch.from_numpy(room).view(getattr(torch, dtype)).to(getattr(torch, other))
    return rows.view(torch.uint8).numpy()


def _within(move: Move, start: int, stop: int) -> tuple[int, int, int]:
    """What of a box lies in rows of its tensor: its first row there, in the file's tensor, and how many."""
    first, last = max(start, move.to_row), min(stop, move.to_row + move.rows)
    return first - start, move.row + first - move.to_row, last - first


def _fetch(move: Move, room: Bytes, start: int, stop: int, size: int, files: _Files, name: str) -> None:
    """Read what a box has of rows of a tensor; compare it where it is a copy."""
    at, row, count = _within(move, start, stop)
    if count <= 0:
        return
    stored, width = move.source.stored, move.source.held.matrix[1] * size
    place = room[at : at + count, move.to_col * size : (move.to_col + move.cols) * size]
    straight = move.copy == 0 and place.flags.c_contiguous and place.shape[1] == width
    rows = place if straight else np.empty((count, width), dtype=np.uint8)
    read_into(files.open[stored.path], stored.offset + row * width, rows.reshape(-1).data, stored.path)
    if straight:
        return
    box = rows[:, move.col * size : (move.col + move.cols) * size]
    if not move.copy:
        place[:] = box
    elif not np.array_equal(place, box):
        raise CheckpointError(
            f"{stored.path}: {move.source.name} is not another rank's: they hold different copies of {name}"
        )


def _deliver(move: Move, room: Bytes, start: int, stop: int, size: int, files: _Files) -> None:
    """Write what a box takes of rows of a tensor."""
    at, row, count = _within(move, start, stop)
    if count <= 0:
        return
    stored, width = move.source.stored, move.source.held.matrix[1] * size
    box = room[at : at + count, move.to_col * size : (move.to_col + move.cols) * size]
    assert box.shape[1] == width, "boxes of a target are as wide as it is"
    content = np.ascontiguousarray(box).reshape(-1)
    write_from(files.open[stored.path], stored.offset + row * width, content.data)


def _check(one: Placed) -> None:
    if isinstance(one.stored, Strided):
        raise CheckpointError(f"{one.stored.path}: {one.name} is not stored row by row")
    if one.stored.shape != one.held.shape:
        raise CheckpointError(
            f"{one.stored.path}: {one.name} has shape {one.stored.shape}, its config says {one.held.shape}"
        )
