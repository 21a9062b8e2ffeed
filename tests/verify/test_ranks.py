"""What is told when ranks fail."""

import os
import time

import pytest

from plait.errors import ProofError
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks


def by_rank(*deeds):
    return deeds[int(os.environ["RANK"])]()


def refuses():
    time.sleep(0.2)
    raise ProofError("2 is not divisible by 4")


def loses_the_other():
    raise ConnectionError("connection closed by peer")


def is_killed():
    os.kill(os.getpid(), 9)


def waits():
    time.sleep(600)


def answers():
    return int(os.environ["RANK"])


def test_each_rank_answers():
    assert run_ranks(answers, Grid(2)) == [0, 1]


def test_the_rank_that_failed_first_is_told_though_another_spoke_before():
    with pytest.raises(ProofError) as error:
        run_ranks(by_rank, Grid(2), loses_the_other, refuses)

    assert "rank 0 failed: Traceback" in str(error.value)
    assert "connection closed by peer" in str(error.value)
    assert "; rank 1 failed: 2 is not divisible by 4" in str(error.value)


def test_what_ranks_say_alike_is_told_once_and_none_is_waited_for():
    with pytest.raises(ProofError) as error:
        run_ranks(by_rank, Grid(3), refuses, waits, refuses)

    assert str(error.value).count("2 is not divisible by 4") == 1


def test_a_killed_rank_is_named():
    with pytest.raises(ProofError, match="rank 1 failed: it ended without a word"):
        run_ranks(by_rank, Grid(2), waits, is_killed)
