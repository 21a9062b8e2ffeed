"""A bar on a terminal. A log has none, and what draws it is not loaded: a small job would wait for it."""

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], what: str, unit: str) -> Iterable[T]:
    """The same items; how far they are is drawn where stderr is a terminal.

    Args:
        items: what is worked through.
        what: a word before the bar, or nothing.
        unit: what one of them is.
    """
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    drawn: Iterable[T] = tqdm(items, desc=what or None, unit=unit)
    return drawn
