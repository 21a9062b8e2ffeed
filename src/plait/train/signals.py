"""Asked to stop: by Slurm before a time limit or a preemption, or by hand. All ranks stop at one iteration.

SIGTERM and SIGUSR2 ask a rank to save and end. Whatever stands between the launcher and the ranks ignores
both, so a signal to all processes of a job reaches the ranks and ends nobody else before them.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

ASK = (signal.SIGTERM, signal.SIGUSR2)
_asked: list[int] = []


def listen() -> None:
    """Let the signals ask this process, from now on, instead of ending it."""
    for number in ASK:
        signal.signal(number, lambda got, _: _asked.append(got))


def ignore() -> None:
    """Let the signals pass this process by, and what it becomes by exec."""
    for number in ASK:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def shielded() -> Iterator[None]:
    """Hold the signals back; processes that are forked here never see them.

    A worker that reads data must live until its rank has saved its place.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def agreed(*own: bool) -> list[bool]:
    """Whether any rank was asked, and of what each says of itself, whether any does.

    Every rank calls this at the same iteration and gets the same answer.
    """
    import torch
    import torch.distributed as dist

    flags = torch.tensor([bool(_asked), *own], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
