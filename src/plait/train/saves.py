"""The saves of a job, one at a time: each in a folder that appears whole, or not at all.

A save takes a copy of the state and is written beside training, where that goes on. All ranks find out
together that it cannot be written; rank 0 puts it into place, alone, as soon as it is whole.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from plait import files
from plait.errors import CheckpointError, LayoutError, PlaitError
from plait.layout import Iteration
from plait.train.beside import Beside, Here
from plait.train.shards import planned
from plait.train.state import TrainState, first_of_copy
from plait.train.writer import Origin

GRACE = 20.0
"""Seconds that a job which has failed still waits for what is being written; torchrun kills after 30."""
log = logging.getLogger(__name__)


@dataclass
class _Open:
    """A save that is being written."""

    writer: Here | Beside
    part: Path
    target: Path
    placed: bool = False


class Saves:
    """What a job saves; all ranks call its methods at the same iterations."""

    def __init__(
        self,
        *,
        beside: bool = False,
        allowed: Callable[[], None] = lambda: None,
        placed: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is saved yet.

        Args:
            beside: whether training may go on while a save is written, for a copy of the state in memory.
            allowed: asked by rank 0 before it puts a save into place; raises where the run is another job's.
            placed: called by rank 0 after that.
        """
        self._beside = Beside() if beside else None
        self._allowed, self._placed = allowed, placed
        self._open: _Open | None = None

    def save(
        self,
        state: TrainState,
        target: Path,
        origin: Origin,
        loader: dict[str, Any] | None = None,
        *,
        goes_on: bool = False,
    ) -> None:
        """Save a checkpoint with its manifest, after the save before.

        Args:
            state: what to save.
            target: the iteration's folder.
            origin: where it comes from.
            loader: where seed and step do not say a place in the data, files that do, by name: this copy's.
            goes_on: whether training does; otherwise the checkpoint is in place afterwards.

        Raises:
            LayoutError: a folder that plait did not make stands at the target.
            CheckpointError: this save, or the one before, cannot be written.
        """
        self.settle()
        part = target.with_name(f".{target.name}.part")
        if dist.get_rank() == 0:
            if not files.made_by_plait(target, Iteration.MARKS):
                raise LayoutError(f"{target} holds files that plait did not make", hint="move them away")
            files.remove(part)
            part.mkdir(parents=True)
        dist.barrier()
        share = planned(state.sharded(is_loading=False), part)
        texts = loader if loader and first_of_copy() else {}
        writer = self._beside if goes_on and self._beside else Here()
        writer.begin(replace(share, texts=texts, origin=origin))
        self._open = _Open(writer, part, target)
        if writer is not self._beside:
            self.settle()

    def look(self) -> bool:
        """Put what was written beside training into place, if it is whole; whether this rank knows it failed.

        Asked at each iteration; no rank waits for another.
        """
        pending = self._open
        if pending is None or not isinstance(pending.writer, Beside):
            return False
        over, failed = pending.writer.hears(wait=0), pending.writer.failed
        if over and not failed and dist.get_rank() == 0:
            self._put(pending)
        return failed

    def settle(self) -> None:
        """Wait until the save is in place.

        Raises:
            CheckpointError: it cannot be written, on whichever rank.
        """
        pending, self._open = self._open, None
        if pending is None:
            return
        _agree(pending.target, pending.writer.written())
        _agree(pending.target, pending.writer.finished())
        if dist.get_rank() == 0:
            self._put(pending)
        dist.barrier()

    def _put(self, pending: _Open) -> None:
        """Rename the folder into place, once."""
        if pending.placed:
            return
        pending.placed = True
        self._allowed()
        files.drop(pending.target)
        pending.part.rename(pending.target)
        files.sync(pending.target.parent, deep=False)
        self._placed()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Settle what is open; a rank that failed asks no other."""
        try:
            if kind is None:
                self.settle()
            elif self._open is not None:
                self._rescue(self._open)
        finally:
            if self._beside is not None:
                self._beside.close()

    def _rescue(self, pending: _Open) -> None:
        """Put a save into place although training has failed, if it is whole soon."""
        assert isinstance(pending.writer, Beside)
        whole = pending.writer.hears(wait=GRACE) and not pending.writer.failed
        if dist.get_rank() > 0:
            return
        try:
            if whole:
                self._put(pending)
        except (PlaitError, OSError) as error:
            log.warning("%s is not kept: %s", pending.target, error)


def _agree(target: Path, said: str) -> None:
    """Go on if no rank says that anything went wrong.

    Raises:
        CheckpointError: what one of them says.
    """
    wrong = torch.tensor([bool(said)], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    if not wrong.item():
        return
    words: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(words, said)
    raise CheckpointError(
        f"{target} could not be written: {next(filter(None, words))}",
        hint="mend that and ask for the same target again: it goes on from what was kept before",
    )
