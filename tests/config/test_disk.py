"""Which checkpoints are thinned out: laws, and what they take at most by counting."""

from hypothesis import given
from hypothesis import strategies as st

from plait.config.disk import Thinning, sizes

STEPS = st.sets(st.integers(1, 40).map(lambda n: 10 * n), min_size=1)
KEEPS = st.one_of(
    st.just("all"),
    st.integers(1, 9).map(lambda n: f"last {n}"),
    st.integers(1, 9).map(lambda n: f"every {10 * n}"),
)
RULES = st.builds(
    Thinning,
    keep=KEEPS,
    save_optim=st.sampled_from(["all", "last", "none"]),
    length=st.integers(1, 40).map(lambda n: 10 * n),
    wanted=STEPS,
    resumed=STEPS,
)


@given(RULES, STEPS)
def test_the_newest_the_final_and_what_is_asked_for_stay(rule, steps):
    weights, optimizers = rule.weights(steps), rule.optimizers(steps)

    assert optimizers <= weights <= steps
    assert {max(steps)} | steps & {rule.length, *rule.wanted, *rule.resumed} <= weights
    assert steps & set(rule.resumed) <= optimizers
    over = rule.save_optim == "none" and max(steps) == rule.length
    assert (max(steps) in optimizers) or over


@given(RULES, STEPS)
def test_what_went_never_has_to_come_back(rule, steps):
    """Applied after every checkpoint, it asks for nothing that it let go before."""
    found, able, so_far = set(), set(), set()
    for step in sorted(steps):
        so_far, found, able = so_far | {step}, found | {step}, able | {step}
        found, able = rule.weights(found), rule.optimizers(found) & able
        assert found == rule.weights(so_far) & found
        assert max(so_far) in found


def test_rules_by_example():
    steps = {10, 20, 30, 40, 50}
    assert Thinning("last 2", "last", 50).weights(steps) == {40, 50}
    assert Thinning("every 20", "last", 90).weights(steps) == {20, 40, 50}
    assert Thinning("all", "last", 90).optimizers(steps) == {50}
    assert Thinning("all", "none", 50).optimizers(steps) == set()
    assert Thinning("all", "none", 90).optimizers(steps) == {50}
    assert Thinning("last 1", "all", 50, wanted=[10]).optimizers(steps) == {10, 50}


def test_the_peak_is_before_the_older_ones_go():
    run = {"params_dtype": "bf16", "optimizer": "adam"}
    weights, optimizer = sizes(run, 7e9)
    assert (weights, optimizer) == (14e9, 84e9)  # masters and two moments in fp32
    steps = range(10, 60, 10)
    assert Thinning("all", "all", 50).peak(steps, weights=1, optimizer=6) == 5 * 7
    assert Thinning("last 1", "last", 50).peak(steps, weights=1, optimizer=6) == 2 * 7
    assert Thinning("all", "last", 50).peak(steps, weights=1, optimizer=6) == 5 * 1 + 2 * 6
    assert Thinning("last 1", "last", 50).peak(steps, weights=1, optimizer=6, together=2) == 3 * 7
