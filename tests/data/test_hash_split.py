"""The split by ids: a law of each id alone."""

from hypothesis import given
from hypothesis import strategies as st

from plait.data.split import place, takes


def of(part, share):
    return {"part": part, "validation": share}


@given(st.text(), st.floats(0, 1))
def test_each_id_is_in_one_of_the_two_parts(id_, share):
    assert takes(of("train", share), id_) != takes(of("validation", share), id_)
    assert takes(None, id_)


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_adds_to_the_validation_part(id_, one, other):
    assert takes(of("validation", max(one, other)), id_) or not takes(of("validation", min(one, other)), id_)


def test_a_share_is_met_and_stays_what_it_is_on_every_machine():
    found = sum(takes(of("validation", 0.1), f"s-{number}") for number in range(20_000))
    assert abs(found - 2_000) < 150
    assert place("s-1") == int("6a840baf5d8c3ff2", 16) / 2**64
