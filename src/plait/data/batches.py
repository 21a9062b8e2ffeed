"""Many things, a few at a time: as many as memory shall hold of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], size_of: Callable[[T], int], *, most: int, largest: int) -> Iterator[list[T]]:
    """Lists of at most ``most`` items, which end with the one that reaches a size of ``largest``."""
    batch: list[T] = []
    size = 0
    for one in items:
        batch.append(one)
        size += size_of(one)
        if len(batch) == most or size >= largest:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
