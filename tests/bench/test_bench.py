"""The rows of `make bench` run: what is measured is not looked at, for other work goes on meanwhile."""

from dataclasses import replace

import pytest

from tests.bench import harness
from tests.bench.__main__ import main
from tests.bench.rows import ROWS

QUICK = (
    "photos-640-to-336", "pictures-kept", "solo-patches-halves", "packs-4096", "packing-seconds-4096",
    "tokens-bpe-raw", "count-tokens", "webdataset-energon", "workers-analyse", "plan-100", "step-tiny-fp32",
)  # fmt: skip
"""Of each group some: those of conversion need gigabytes and minutes."""


@pytest.mark.long
@pytest.mark.parametrize("name", QUICK)
def test_a_row_is_measured(name, capsys):
    assert harness.printed(replace(ROWS[name], rounds=1, target=0.0))

    words = capsys.readouterr().out.split()
    assert words[0] == name
    assert min(map(float, words[1:4:2])) > 0


@pytest.mark.parametrize(("target", "most", "met"), [(2.0, 100, True), (2.1, 100, False), (2.0, 99, False)])
def test_a_row_is_missed_by_its_ratio_and_by_its_memory(target, most, met, monkeypatch, capsys):
    monkeypatch.setattr(harness, "_told", lambda *_: harness.Told(2.0, "there", 100))
    assert harness.printed(harness.Figure("some", target, print, most=most)) == met
    assert ("missed" in capsys.readouterr().out) != met


def test_a_row_whose_check_fails_says_so_and_others_go_on(monkeypatch, capsys):
    def check(*_):
        raise AssertionError("0.3 apart")

    monkeypatch.setattr(harness, "_told", lambda *_: harness.Told(1.0))
    row = harness.Row("some", 1, lambda *_: None, print, print, check)
    monkeypatch.setitem(ROWS, "some", row)
    monkeypatch.setitem(ROWS, "some-more", replace(row, name="some-more", check=lambda *_: "alike"))
    with pytest.raises(SystemExit) as ended:
        main(["some"])
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert "failed: 0.3 apart" in out
    assert "alike" in out
    assert "1 of 2 rows missed" in out
