"""Processes beside this one that share the work on batches; results come in the order of the batches."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from plait.errors import DataError

B = TypeVar("B")
R = TypeVar("R")
AHEAD = 2
"""Batches for each process that are given to it before it has asked."""
HELD = 8
"""Batches for each process that are held at most; more wait until the first of them is done."""


class Helpers(Generic[B, R]):
    """So many processes that do one thing, which this one does too where they have enough."""

    def __init__(self, count: int, work: Callable[[B], R]) -> None:
        """Take what is done with a batch; processes begin with the first, and with this one's memory."""
        self._count, self._work = count, work
        fork = multiprocessing.get_context("fork")
        self._others = ProcessPoolExecutor(count, fork, _take, (work,)) if count else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._others:
            self._others.shutdown(cancel_futures=True)

    def in_order(self, batches: Iterable[B]) -> Iterator[tuple[B, R]]:
        """Each batch with what became of it.

        Raises:
            DataError: a process was killed.
        """
        waited: deque[tuple[B, Future[R]]] = deque()
        try:
            for batch in batches:
                waited.append((batch, self._begun(batch, sum(not one.done() for _, one in waited))))
                while waited and (waited[0][1].done() or len(waited) > HELD * self._count):
                    yield _ended(waited.popleft())
            while waited:
                yield _ended(waited.popleft())
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed, as the system does it where memory is short",
                hint="ask for fewer threads, or for more memory",
            ) from error

    def _begun(self, batch: B, busy: int) -> "Future[R]":
        if self._others and busy < AHEAD * self._count:
            return self._others.submit(_do, batch)
        done: Future[R] = Future()
        done.set_result(self._work(batch))
        return done


def _ended(one: tuple[B, "Future[R]"]) -> tuple[B, R]:
    return one[0], one[1].result()


_own: list[Callable[[Any], Any]] = []
"""What a helper does."""


def _take(work: Callable[[Any], Any]) -> None:
    _own[:] = [work]


def _do(batch: Any) -> Any:
    return _own[0](batch)
