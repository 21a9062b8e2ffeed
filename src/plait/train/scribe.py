"""The process that writes a rank's share beside training: ``python -m plait.train.scribe FD FD PID``.

It imports no Megatron Core, which would take seconds and memory.
"""

import contextlib
import ctypes
import mmap
import os
import pickle
import signal
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from plait.train.beside import Held, tried
from plait.train.writer import Share, finish, write

PR_SET_PDEATHSIG = 1


def main(pipe: int, memory: int, parent: int) -> None:
    """Write what the rank has copied, whenever it says so, until it is gone.

    Args:
        pipe: the file by which the rank says where a share begins in the memory, and how long it is.
        memory: the file of the memory.
        parent: the rank's process.
    """
    _end_with(parent)
    rank = Connection(pipe)
    with contextlib.suppress(EOFError):
        while True:
            start, length = rank.recv()
            share = _share(mmap.mmap(memory, 0), start, length)
            said = tried(write, share)
            rank.send(said)
            if share.rank == 0 and not said:
                rank.send(tried(finish, share))


def _end_with(parent: int) -> None:
    """Be killed when the rank ends, or end now if it has; be asked to stop by nothing else."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _share(memory: Any, start: int, length: int) -> Share:
    """The share, with tensors that lie in the memory."""
    share: Share = pickle.loads(memory[start : start + length])  # noqa: S301 - the rank has written it
    items = [
        (item, value.tensor(memory) if isinstance(value, Held) else value) for item, value in share.items
    ]
    return replace(share, items=items)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
