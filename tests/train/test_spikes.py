"""When a loss is a spike, and that a run that goes on judges as one that never stopped."""

import json
import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.train.rows import Rows, to_line
from plait.train.spikes import SPIKE, Spikes


class Nowhere:
    """Where events are written, in memory."""

    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(json.loads(to_line(row)))


def watch(tmp_path, losses, threshold, before=()):
    """The iterations that are spikes, and their events."""
    events = Nowhere()
    rows = [{"iteration": n, "lm loss": loss} for n, loss in enumerate(before, 1)]
    spikes = Spikes(tmp_path / "r", threshold, rows, events)
    told = [spikes.check({"iteration": n, "lm loss": loss}) for n, loss in enumerate(losses, len(before) + 1)]
    return [n for n, one in enumerate(told, len(before) + 1) if SPIKE in one], events.rows


LOSSES = st.lists(st.one_of(st.floats(0.01, 100), st.sampled_from([math.inf, math.nan])), max_size=30)


def by_the_rule(losses, threshold):
    found = []
    for number, loss in enumerate(losses):
        finite = [one for one in losses[:number] if math.isfinite(one)][-10:]
        high = bool(finite) and loss > median(finite) * (1 + threshold)
        if high or not math.isfinite(loss):
            found.append(number + 1)
    return found


@given(LOSSES, st.floats(0.1, 3))
def test_spikes_are_those_of_the_rule(tmp_path_factory, losses, threshold):
    assert watch(tmp_path_factory.getbasetemp(), losses, threshold)[0] == by_the_rule(losses, threshold)


@given(LOSSES, st.integers(0, 30))
def test_who_goes_on_judges_as_who_never_stopped(tmp_path_factory, losses, cut):
    whole, _ = watch(tmp_path_factory.getbasetemp(), losses, 0.5)
    later, _ = watch(tmp_path_factory.getbasetemp(), losses[cut:], 0.5, before=losses[:cut])
    assert later == [n for n in whole if n > cut]


def test_without_a_threshold_or_a_loss_nothing_is_a_spike(tmp_path):
    assert watch(tmp_path, [1.0, 9.0, math.nan], None) == ([], [])
    assert Spikes(tmp_path / "r", 0.5, [], Nowhere()).check({"iteration": 1, "skipped samples": 4}) == {}


def test_an_event_is_json_that_any_program_reads(tmp_path, caplog):
    steps, events = watch(tmp_path, [1.0, 4.0, math.nan], 2.0)
    assert steps == [2, 3]
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
