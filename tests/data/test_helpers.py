"""What processes do together comes in order, and no more of it is held than is said."""

import os
import signal
import time

import pytest

from plait.data import helpers
from plait.data.helpers import Helpers
from plait.errors import DataError


def slow_first(number):
    """The first takes longer than all others together."""
    if number == 0:
        time.sleep(0.5)
    return number * number, os.getpid()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_results_come_in_order_and_few_are_held(count):
    taken, most = [], 0

    def counted():
        for number in range(40):
            taken.append(number)
            yield number

    seen, processes = [], set()
    with Helpers(count, slow_first) as some:
        for number, (square, process) in some.in_order(counted()):
            most = max(most, len(taken) - len(seen))
            seen.append((number, square))
            processes.add(process)

    assert seen == [(number, number * number) for number in range(40)]
    assert most <= helpers.HELD * count + 1
    assert os.getpid() in processes
    assert bool(processes - {os.getpid()}) == bool(count)


def test_what_a_helper_raises_comes_here():
    with Helpers(1, int) as some, pytest.raises(ValueError, match="no number"):
        list(some.in_order(["1", "no number"]))


HERE = os.getpid()


def killed_elsewhere(number):
    if os.getpid() != HERE:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_helper_that_the_system_kills_is_told_in_a_sentence():
    with Helpers(1, killed_elsewhere) as some, pytest.raises(DataError, match="a worker was killed"):
        list(some.in_order(range(100)))
