"""Run a function on the ranks of a grid, in forked processes of this one that meet in a file."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from plait.errors import PlaitError, ProofError
from plait.parallel.grid import Grid

MOMENT = 1
"""Seconds in which ranks that fail together say so."""


def run_ranks(
    function: Callable[..., Any],
    grid: Grid,
    *args: Any,
    copies: int = 1,
    cp: int = 1,
    chunks: int | None = None,
    ep: int = 1,
    seed: int = 0,
) -> list[Any]:
    """Call ``function(*args)`` on every rank of ``copies`` data parallel copies of a grid, with gloo.

    Each sequence is shared by ``cp`` context parallel ranks, each stage is cut into ``chunks``.

    GPUs are hidden from it: a fork cannot use them, and float64 is fast enough without.

    Forking after the imports saves seconds a rank. OpenMP's threads do not survive a fork, and a child
    would wait for them for ever: this process must have had OMP_NUM_THREADS=1 before it loaded torch.

    Returns:
        What each rank returned, by rank; results are pickled between the processes.

    Raises:
        ProofError: a rank failed; what it said is in the message, and what others said that failed with it.
    """
    if torch.get_num_threads() != 1:
        raise RuntimeError("run_ranks forks: set OMP_NUM_THREADS=1 before torch is loaded")
    context = multiprocessing.get_context("fork")
    world = len(grid) * copies * cp
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            axes = {"tp": grid.tp, "pp": grid.pp, "cp": cp, "ep": ep, "chunks": chunks}
            job = (there, f"file://{folder}/store", rank, world, axes, seed, function, args)
            process = context.Process(target=_rank, args=job)
            process.start()
            there.close()
            ranks.append((process, here))
        return _collect(ranks)


def _collect(ranks: list[tuple[Any, Connection]]) -> list[Any]:
    """Every rank's result; a failure ends the rest.

    Ranks that lose a failed one fail too, and may say so first: all are told that fail within the moment.
    """
    waiting: dict[Any, tuple[int, Any]] = {here: (n, process) for n, (process, here) in enumerate(ranks)}
    results: list[Any] = [None] * len(ranks)
    failures: dict[str, int] = {}
    try:
        while waiting and (ready := wait(list(waiting), MOMENT if failures else None)):
            for pipe in ready:
                rank, process = waiting.pop(pipe)
                failed, value = _told(pipe)
                if failed:
                    failures.setdefault(value, rank)
                    process.terminate()
                else:
                    results[rank] = value
                process.join()
    finally:
        for _, process in waiting.values():
            process.terminate()
            process.join()
    if failures:
        raise ProofError("; ".join(f"rank {rank} failed: {value}" for value, rank in failures.items()))
    return results


def _told(pipe: Any) -> tuple[bool, Any]:
    try:
        failed, value = pipe.recv()
    except EOFError:
        failed, value = True, "it ended without a word; was it killed for want of memory?"
    return failed, value


def _rank(
    pipe: Connection,
    rendezvous: str,
    rank: int,
    world_size: int,
    axes: dict[str, Any],
    seed: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    from plait.train.world import world

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with world(**axes, seed=seed, rendezvous=rendezvous):
            value = function(*args)
        pipe.send((False, value))
    except PlaitError as error:
        pipe.send((True, str(error)))
    except BaseException:  # noqa: BLE001 - whatever it was, the parent raises it
        pipe.send((True, traceback.format_exc()))
