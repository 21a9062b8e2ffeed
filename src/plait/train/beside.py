"""Writing a rank's share of a checkpoint: at once, or beside training, by a process of the rank's own.

That process writes copies of the rank's tensors, in memory that both share and that is kept from save to
save: the copying is all that training waits for. It is not forked from the rank, has no part in the process
group, and ends with its rank; ``scribe.py`` is what it does.
"""

import contextlib
import math
import mmap
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.train import signals
from plait.train.writer import Share, finish, write

ALIGNED = 64
"""Bytes at whose multiples the copies begin."""
SLACK = 1 << 20
"""Bytes by which one save may be larger than the one before, in the same memory."""
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""What keeps the process that writes off the rank's GPU and cores."""


class Here:
    """Writes at once: nothing is trained meanwhile."""

    def begin(self, share: Share) -> None:
        """Write the share."""
        self._share, self._said = share, tried(write, share)

    def written(self) -> str:
        """See :meth:`Beside.written`."""
        return self._said

    def finished(self) -> str:
        """See :meth:`Beside.finished`."""
        return tried(finish, self._share) if self._share.rank == 0 else ""


class Beside:
    """The process that writes beside training, seen from its rank; it is started by the first save."""

    def __init__(self) -> None:
        """Without a process yet."""
        self._memory = _Memory()
        self._process: subprocess.Popen[bytes] | None = None
        self._said: list[str] = []
        self._words = 0

    def begin(self, share: Share) -> None:
        """Copy the share, and have it written; the last one has been."""
        copies, items, end = [], [], 0
        for item, value in share.items:
            if isinstance(value, Tensor) and value.numel():
                held = Held.after(end, value)
                copies.append((held, value))
                items.append((item, held))
                end = held.end
            else:
                items.append((item, value))
        words = pickle.dumps(replace(share, items=items))
        self._memory.grow(end + len(words))
        for held, tensor in copies:
            held.tensor(self._memory.bytes).copy_(tensor.detach(), non_blocking=True)
        torch.cuda.synchronize()
        self._memory.bytes[end : end + len(words)] = words
        if self._process is None:
            self._process = self._started()
        self._said, self._words = [], 2 if share.rank == 0 else 1
        with contextlib.suppress(ConnectionError):  # of a process that is gone, its rank hears the end
            self._pipe.send((end, len(words)))

    def _started(self) -> "subprocess.Popen[bytes]":
        self._pipe, there = multiprocessing.Pipe()
        given = there.fileno(), self._memory.file
        with signals.shielded(), there:
            words = [sys.executable, "-m", "plait.train.scribe", *map(str, given), str(os.getpid())]
            return subprocess.Popen(words, pass_fds=given, env={**os.environ, **ENVIRONMENT})

    def written(self) -> str:
        """Wait until the share is written; what went wrong, or "" if nothing did."""
        self.hears(1)
        return self._said[0]

    def finished(self) -> str:
        """Wait until rank 0 has made the whole of all shares; what went wrong, or ""."""
        self.hears()
        return self._said[-1]

    def hears(self, words: int | None = None, *, wait: float | None = None) -> bool:
        """Whether the process has said so many words, or what went wrong, within some seconds.

        Args:
            words: "" for each that it has done: the share, and on rank 0 the whole; None: all.
            wait: None: as long as it takes.
        """
        until = None if wait is None else time.monotonic() + wait
        while len(self._said) < (words or self._words) and not self.failed:
            if until is not None and not self._pipe.poll(max(until - time.monotonic(), 0)):
                return False
            try:
                self._said.append(self._pipe.recv())
            except (EOFError, ConnectionError):
                assert self._process is not None
                self._said.append(f"the process that wrote it ended with status {self._process.wait()}")
        return True

    @property
    def failed(self) -> bool:
        """Whether something is known to have gone wrong."""
        return any(self._said)

    def close(self) -> None:
        """End the process, whatever it does, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()


class Held(NamedTuple):
    """The copy of a tensor: where it begins, and its form, which is what a clone's would be."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def after(cls, end: int, tensor: Tensor) -> Self:
        """The place of a tensor's copy behind others."""
        strides = torch.empty_like(tensor, device="meta").stride()
        return cls(-(-end // ALIGNED) * ALIGNED, tensor.dtype, tuple(tensor.shape), strides)

    @property
    def end(self) -> int:
        """Where the next may begin."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def tensor(self, memory: Any) -> Tensor:
        """It, as a tensor whose storage is nothing but its own bytes."""
        flat = torch.frombuffer(memory, dtype=self.dtype, count=math.prod(self.shape), offset=self.start)
        return flat.as_strided(self.shape, self.strides)


class _Memory:
    """Memory that two processes see; it only grows."""

    def __init__(self) -> None:
        self.file, self.size = os.memfd_create("plait-save"), 0

    def grow(self, size: int) -> None:
        """Have room for so many bytes; a GPU writes into it by itself."""
        if size <= self.size:
            return
        gpu = torch.cuda.is_available()
        if gpu and self.size:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._address()))
        self.size = size + SLACK
        os.ftruncate(self.file, self.size)
        self.bytes = mmap.mmap(self.file, self.size)
        if gpu:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._address(), self.size, 0))

    def _address(self) -> int:
        return torch.frombuffer(self.bytes, dtype=torch.uint8).data_ptr()


def tried(work: Callable[[Share], None], share: Share) -> str:
    """Do it; what went wrong, or ""."""
    try:
        work(share)
    except OSError as error:
        return error.strerror or str(error)
    except PlaitError as error:
        return str(error.args[0])
    return ""
