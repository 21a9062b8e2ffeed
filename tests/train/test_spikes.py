"""When a loss is a spike, and that a run that goes on judges as one that never stopped."""

import json
import math
from itertools import takewhile
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.train import spikes
from plait.train.rows import Rows, to_line
from plait.train.spikes import OVER, SPIKE, Spikes


class Nowhere:
    """Where events are written, in memory."""

    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(json.loads(to_line(row)))


def watch(tmp_path, losses, threshold, before=()):
    """The rows of iterations with these losses, after the rows ``before``, and their events."""
    events, first = Nowhere(), len(before) + 1
    watching = Spikes(tmp_path / "r", threshold, [*before], events)
    rows = [
        {"iteration": n} | ({} if loss is None else {"lm loss": loss}) for n, loss in enumerate(losses, first)
    ]
    return [json.loads(to_line(row | watching.check(row))) for row in rows], events.rows


LOSSES = st.lists(
    st.one_of(st.floats(0.01, 100), st.sampled_from([math.inf, math.nan, math.nan, None])), max_size=30
)
"""None stands for an iteration that was left out."""


def by_the_rule(losses, threshold):
    """The iterations that are marked, and the events by iteration and name, by looking back from each."""
    marked, told = [], []
    for number, loss in enumerate(losses):
        if loss is None:
            continue
        so_far = [one for one in losses[:number] if one is not None]
        finite = [one for one in so_far if math.isfinite(one)][-10:]
        stretch = len([*takewhile(lambda one: not math.isfinite(one), reversed(so_far))])
        high = bool(finite) and loss > median(finite) * (1 + threshold)
        if stretch and math.isfinite(loss):
            told.append((number + 1, OVER, stretch))
        if high or not math.isfinite(loss):
            marked.append(number + 1)
            if math.isfinite(loss) or not stretch:
                told.append((number + 1, SPIKE, None))
    return marked, told


def said(rows, events):
    """The same of what was said."""
    marked = [row["iteration"] for row in rows if SPIKE in row]
    return marked, [(one["iteration"], one["event"], one.get("iterations")) for one in events]


@given(LOSSES, st.floats(0.1, 3))
def test_spikes_are_those_of_the_rule(tmp_path_factory, losses, threshold):
    rows, events = watch(tmp_path_factory.getbasetemp(), losses, threshold)
    assert said(rows, events) == by_the_rule(losses, threshold)


@given(LOSSES, st.integers(0, 30))
def test_who_goes_on_judges_as_who_never_stopped(tmp_path_factory, losses, cut):
    rows, events = watch(tmp_path_factory.getbasetemp(), losses, 0.5)
    later, told = watch(tmp_path_factory.getbasetemp(), losses[cut:], 0.5, before=rows[:cut])
    assert later == rows[cut:]
    assert told == [one for one in events if one["iteration"] > cut]


def test_a_stretch_is_told_once_and_its_end_once(tmp_path, caplog):
    losses = [2.0, math.nan, math.inf, math.nan, 2.0, math.nan, 9.0]
    rows, events = watch(tmp_path, losses, 2.0)
    assert [row["iteration"] for row in rows if SPIKE in row] == [2, 3, 4, 6, 7]
    assert [(one["iteration"], one["event"]) for one in events] == [
        (2, SPIKE), (5, OVER), (6, SPIKE), (7, OVER), (7, SPIKE)
    ]  # fmt: skip
    over = {"event": OVER, "lm loss": 2.0, "first": 2, "last": 4, "iterations": 3}
    assert events[1] == {"iteration": 5, **over}
    assert [json.loads(one.message) for one in caplog.records] == events


def test_a_stretch_that_nobody_watched_is_told_by_who_does(tmp_path):
    before, events = watch(tmp_path, [1.0, math.nan, math.nan], None)
    assert events == []
    _, events = watch(tmp_path, [math.nan, math.nan, 1.0], 2.0, before=before)
    assert [(one["iteration"], one.get("iterations")) for one in events] == [(4, None), (6, 2)]


def test_what_samples_stand_for_is_read_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(spikes.lineage, "sources", lambda folder: asked.append(folder) or [])
    _, events = watch(tmp_path, [1.0, 9.0, math.nan, 1.0, math.nan], 2.0)
    assert len(events) == 4
    assert asked == [tmp_path / "r/samples"]


def test_without_a_threshold_or_a_loss_nothing_is_a_spike(tmp_path):
    assert said(*watch(tmp_path, [1.0, 9.0, math.nan], None)) == ([], [])
    assert Spikes(tmp_path / "r", 0.5, [], Nowhere()).check({"iteration": 1, "skipped samples": 4}) == {}


def test_an_event_is_json_that_any_program_reads(tmp_path, caplog):
    rows, events = watch(tmp_path, [1.0, 4.0, math.nan], 2.0)
    assert [row["iteration"] for row in rows if SPIKE in row] == [2, 3]
    assert events[0]["jump"] == 3.0
    assert (events[1]["lm loss"], events[1]["jump"]) == ("nan", "inf")
    assert [json.loads(one.message, parse_constant=pytest.fail) for one in caplog.records] == events


def test_events_of_iterations_that_are_trained_again_go(tmp_path):
    with Rows(tmp_path / "e.jsonl", start=0, stop=9) as rows:
        for n in (7, 3, 5):
            rows.write({"iteration": n})
    again = Rows(tmp_path / "e.jsonl", start=4, stop=6)
    assert [row["iteration"] for row in again.before()] == [3]
    assert again.later
    assert (tmp_path / "e.jsonl").read_text() == '{"iteration": 3}\n{"iteration": 7}\n'
