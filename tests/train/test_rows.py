"""Files of a row an iteration: strict JSON, whose iterations are read off their beginnings."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.config.run import Logging
from plait.errors import DataError
from plait.report import curves
from plait.train import lineage, rows
from plait.train.metrics import Metrics
from plait.train.rows import Rows

LOGGING = Logging().model_dump() | {"spike_threshold": 2.0}
FIGURES = st.dictionaries(
    st.text().filter(lambda name: name != "iteration"), st.one_of(st.floats(), st.integers(), st.text())
)


def strictly(text):
    """Parse what any program parses; the names that Python adds to JSON are none of it."""
    return json.loads(text, parse_constant=pytest.fail)


def same(one, other):
    return one == other or (isinstance(one, float) and str(one) == str(float(other)))


@given(FIGURES)
def test_every_figure_is_strict_json_and_comes_back(figures):
    line = rows.to_line(figures)
    found = strictly(line)
    assert "\n" not in line
    assert all(same(figures[name], found[name]) for name in {*figures, *found})


def test_the_iteration_of_a_row_of_ours_is_known_without_parsing_it(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    with Rows(path, start=0, stop=20) as out:
        for step in (3, 12, 1):
            out.write({"samples": ["}"] * 3, "iteration": step})
    monkeypatch.setattr(rows.json, "loads", pytest.fail)
    Rows(path, start=11, stop=12).close()
    assert [step for step, _ in rows.numbered(path)] == [1, 3]


def test_rows_that_another_program_wrote_are_read_too(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"lm loss":2.0,"iteration":4}\n{ "iteration" : 2, "lm loss": NaN }\n{"iteration": 1}\n{"i'
    )
    assert [row["iteration"] for row in Rows(path, start=4, stop=9).before()] == [1, 2, 4]


@pytest.mark.parametrize("line", ["\0\0\0", "[]", "7", '{"lm loss": 1.0}', '{"iteration": null}', ""])
def test_a_line_that_is_no_row_is_named(line, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"iteration": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"m\.jsonl line 2 is not the row of an iteration"):
        Rows(path, start=1, stop=2)


def test_losses_that_are_no_numbers_are_read_back_by_all_that_read_them(tmp_path):
    losses = [2.0, math.nan, math.inf, 1.0]
    for start, stop in ((0, 2), (2, 4)):
        with Metrics(tmp_path, start=start, stop=stop, logged=LOGGING) as metrics:
            for step in range(start + 1, stop + 1):
                figures = {"lm loss": losses[step - 1], "grad norm": math.inf, "learning-rate": 0.1}
                metrics.write({"iteration": step, **figures, "validation lm loss": math.nan})
    path = tmp_path / "metrics.jsonl"

    assert [strictly(line)["lm loss"] for line in path.read_text().splitlines()] == [2.0, "nan", "inf", 1.0]
    for line in (tmp_path / "events.jsonl").read_text().splitlines():
        strictly(line)
    curve = curves.read(path)
    assert str(curve.loss.tolist()) == str(losses)
    assert curve.spikes == [2, 3]
    curves.draw(curve, tmp_path / "loss.svg", form="svg", name="r")
    assert "nan" in curves.sentence(curves.read(path, last=2))


def test_the_last_step_of_a_log_is_the_highest(tmp_path):
    assert lineage.last_step(tmp_path) == 0
    with Rows(tmp_path / "dp_000.jsonl", start=0, stop=9) as out:
        out.write({"iteration": 1, "samples": []})
    (tmp_path / "dp_000.jsonl").open("a").write('{"iteration": 11, "samples": []}\n{"iteration": 12, "sam')
    assert lineage.last_step(tmp_path) == 11
