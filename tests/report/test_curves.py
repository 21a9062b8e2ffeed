import json
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from plait.cli.main import main
from plait.errors import DataError, LayoutError
from plait.report import curves

ROWS = [
    {"iteration": n, "lm loss": 10 / n, "grad norm": 1.0 + n % 3, "learning-rate": 1e-3 * n}
    for n in range(1, 41)
]
SETTINGS = json.dumps({"exports": [10, 30]})


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data/ckpts/r/metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def report(picture="data/reports/r/loss.svg", settings=SETTINGS):
    return main(["report", "data/ckpts/r/metrics.jsonl", picture, "--settings", settings])


def test_the_picture_ends_at_the_last_export(metrics, tmp_path, caplog):
    caplog.set_level("INFO")

    def drawn_with(row, loss):
        text = "".join(json.dumps(one | {"lm loss": loss} if one is row else one) + "\n" for one in ROWS)
        metrics.write_text(text)
        assert report() == 0
        return (tmp_path / "data/reports/r/loss.svg").read_bytes()

    first = drawn_with(None, 0)

    assert "lm loss 10.00 at iteration 1, 0.33 at iteration 30" in caplog.text
    assert drawn_with(ROWS[30], 9.0) == first
    assert drawn_with(ROWS[29], 9.0) != first


@pytest.mark.parametrize("ending", curves.FORMS)
def test_equal_rows_give_equal_bytes(ending, metrics, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        curves.draw(curves.read(metrics), path, form=ending, name="r", exports=[10])

    assert one.read_bytes() == two.read_bytes()
    assert not re.search(rb"20\d\d-\d\d-\d\d", one.read_bytes())


def test_evaluations_are_drawn_and_said(metrics, tmp_path):
    plain = tmp_path / "plain.svg"
    curves.draw(curves.read(metrics), plain, form="svg", name="r")
    rows = [row | ({"validation lm loss": 1.25} if row["iteration"] in {20, 40} else {}) for row in ROWS]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = curves.read(metrics, last=30)

    curves.draw(curve, tmp_path / "evaluated.svg", form="svg", name="r")

    assert curves.sentence(curve).endswith("0.33 at iteration 30; validation 1.25 at 20")
    assert (tmp_path / "evaluated.svg").read_bytes() != plain.read_bytes()


def test_half_a_line_at_the_end_is_no_row(metrics):
    metrics.write_text(metrics.read_text()[:-20])

    assert curves.read(metrics).iteration.tolist() == list(range(1, 40))


def test_a_line_that_is_no_row_is_named(metrics):
    metrics.write_text(metrics.read_text() + '{"iteration": 41}\n')

    with pytest.raises(DataError, match=r"metrics.jsonl line 41 is not a row of metrics"):
        curves.read(metrics)


def test_nothing_to_draw_is_said(metrics):
    with pytest.raises(DataError, match="holds no iteration up to 0"):
        curves.read(metrics, last=0)
    metrics.unlink()
    with pytest.raises(DataError, match="does not exist"):
        curves.read(metrics)


def test_a_picture_of_another_kind_or_run_is_refused(metrics, tmp_path, capsys):
    assert report("data/reports/r/loss.pdf") == report("data/reports/other/loss.svg") == 2
    said = capsys.readouterr().err

    assert "hint:  end it in .svg or .png" in said
    assert "it is drawn from data/ckpts/other/metrics.jsonl" in said
    assert not (tmp_path / "data/reports").exists() or not list((tmp_path / "data/reports").rglob("*.*"))
    with pytest.raises(LayoutError):
        curves.draw(curves.read(metrics), tmp_path / "x", form="pdf", name="r")


def test_smoothing_is_the_mean_of_a_value_and_those_before_it():
    values = np.array([1.0, 3.0, 5.0, 7.0])

    assert curves.smooth(values, 2).tolist() == [1, 2, 4, 6]
    assert curves.smooth(values, 1).tolist() == values.tolist()


def test_an_iteration_that_was_left_out_is_no_point_of_the_curve(metrics):
    left_out = {"iteration": 5, "skipped samples": 8}
    metrics.write_text("".join(json.dumps(left_out if n == 4 else row) + "\n" for n, row in enumerate(ROWS)))

    assert curves.read(metrics).iteration.tolist() == [1, 2, 3, 4, *range(6, 41)]


@pytest.mark.parametrize("exports", [(), (10,)])
def test_the_curve_fills_the_picture_with_exports_and_without(exports, metrics, tmp_path):
    curves.draw(curves.read(metrics), tmp_path / "x.png", form="png", name="r", exports=exports)
    with Image.open(tmp_path / "x.png") as picture:
        middle = np.asarray(picture.convert("L").crop((0, 150, picture.width, 480)))
    assert (middle < 255).any(axis=1).all()  # an axis stands in every row of it


def test_what_is_no_number_is_left_out_of_the_mean():
    assert curves.smooth(np.array([1.0, np.nan, 3.0, np.inf]), 2).tolist() == [1, 1, 3, 3]


def test_a_loss_that_is_no_number_is_marked_where_it_can_be_seen(metrics, tmp_path):
    bad = {"lm loss": float("nan"), "loss spike": float("inf")}
    metrics.write_text(
        "".join(json.dumps(row | (bad if n == 20 else {})) + "\n" for n, row in enumerate(ROWS))
    )
    curve = curves.read(metrics)

    curves.draw(curve, tmp_path / "x.svg", form="svg", name="r")

    assert curve.spikes == [21]
    assert curves.sentence(curve).endswith("; 1 spike, the last at 21")


def test_marks_one_after_another_have_one_number(metrics, tmp_path, monkeypatch):
    jumps = {5: 2.0, 11: float("inf"), 12: float("inf"), 13: float("inf"), 30: 1.0}
    more = [{"loss spike": jumps[row["iteration"]]} if row["iteration"] in jumps else {} for row in ROWS]
    metrics.write_text("".join(json.dumps(row | one) + "\n" for row, one in zip(ROWS, more, strict=True)))
    numbers = []
    monkeypatch.setattr(Axes, "annotate", lambda axis, text, *rest, **how: numbers.append(text))
    curve = curves.read(metrics)

    curves.draw(curve, tmp_path / "x.svg", form="svg", name="r")

    assert curve.spikes == [*jumps]
    assert numbers == ["5", "11", "30"]
