"""The rows of `make bench` run: what is measured is not looked at, for other work goes on meanwhile."""

from dataclasses import replace

import pytest

from tests.bench import harness
from tests.bench.rows import ROWS

QUICK = (
    "photos-640-to-336", "pictures-kept", "solo-patches", "packs-4096", "packing-seconds-4096",
    "count-tokens", "webdataset-energon", "workers-analyse", "plan-100", "step-tiny-fp32",
)  # fmt: skip
"""Of each group some: those of conversion and of raw text need gigabytes and minutes."""


@pytest.mark.long
@pytest.mark.parametrize("name", QUICK)
def test_a_row_is_measured(name, capsys):
    harness.printed(replace(ROWS[name], rounds=1, target=0.0))

    words = capsys.readouterr().out.split()
    assert words[0] == name
    assert min(map(float, words[1:4:2])) > 0
