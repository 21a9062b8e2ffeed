"""A tally describes numbers as numpy describes them one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.tokens import analysis
from plait.tokens.tally import Tally

NUMBERS = st.lists(st.integers(0, 60) | st.integers(0, 1 << 31), min_size=1, max_size=80)


@given(NUMBERS, st.integers(0, 80))
def test_figures_are_those_of_the_numbers(numbers, at):
    whole = np.array(numbers)
    tally = Tally.together([Tally.of(whole[:at]), Tally.of(whole[at:])])
    shares = [0, 0.1, 0.25, 0.5, 1 / 3, 0.75, 1]

    assert (len(tally), tally.total) == (len(numbers), sum(numbers))
    assert tally.mean == pytest.approx(whole.mean(), rel=1e-12)
    assert tally.deviation == pytest.approx(whole.std(ddof=1) if len(whole) > 1 else 0, rel=1e-9)
    np.testing.assert_allclose(tally.quantile(shares), np.quantile(whole, shares), rtol=1e-12, atol=1e-9)
    assert tally.at(np.arange(len(numbers))).tolist() == sorted(numbers)
    counts = dict(zip(*(column.tolist() for column in np.unique(whole, return_counts=True)), strict=True))
    again = Tally.counted(counts)
    assert (again.values.tolist(), again.counts.tolist()) == (tally.values.tolist(), tally.counts.tolist())


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200))
def test_bins_are_those_of_the_numbers(numbers):
    tally = Tally.of(np.array(numbers))
    found, fill = analysis.histogram(tally), analysis.filled(tally, 500)

    assert found["counts"] == np.histogram(numbers, found["edges"])[0].tolist()
    assert sum(found["counts"]) == len(numbers)
    bins = [min(number * analysis.FILLS // 500, analysis.FILLS - 1) for number in numbers]
    assert fill["counts"] == np.bincount(bins, minlength=analysis.FILLS).tolist()
    assert fill["mean"] == pytest.approx(np.mean(numbers) / 500, abs=1e-6)
    order = sorted(numbers)
    assert analysis.quantiles(tally)[-1] == order[-1]
    assert analysis.quantiles(tally)[100] == order[-(-100 * len(order) // 200) - 1]
