"""A LLaVA run on other numbers of copies: the same samples in the same order, the same losses."""

import json

import numpy as np
import pytest
from jobs import pictured, saved

from plait.errors import ConfigError

STEPS, EVERY = 9, 3
KEYS = {"train_iters": STEPS, "save_interval": EVERY, "hidden_dropout": 0.0, "global_batch_size": 8}


def samples(place):
    """Of each step the samples in the order of the global batch, as the copies' logs have them."""
    found = {}
    for path in sorted((place.ckpts / "samples").glob("dp_*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            numbers = range(row["copy"], len(row["samples"]) * row["copies"], row["copies"])
            assert row["micro_batch_size"] == 1
            found.setdefault(row["iteration"], {}).update(zip(numbers, row["samples"], strict=True))
    return {step: [one for _, one in sorted(seen.items())] for step, seen in found.items()}


def losses(place):
    return {row["iteration"]: row["lm loss"] for row in place.rows()}


def straight(root, **keys):
    place = pictured(root, **KEYS | keys)
    schedule = place.ckpts / "schedule.json"
    schedule.write_text(json.dumps({"train_iters": STEPS, "save_interval": EVERY}))
    place.train(to=EVERY, asked={"until": STEPS})
    return place


def goes_on(place, name, step, **keys):
    """A run that goes on after a step of another, up to the last."""
    more = place.after(name, step, steps=STEPS, finetune=False, **keys)
    schedule = more.ckpts / "schedule.json"
    schedule.write_text(json.dumps({"train_iters": STEPS, "save_interval": EVERY}))
    until = min(step + EVERY, STEPS)
    words = {"to": until, "asked": {"until": until}}
    more.train(**words)
    return more


def check(parts, whole):
    """Each step of the parts is that of the whole: as many samples, the same, in the same order."""
    seen, lost = samples(whole), losses(whole)
    assert len({len(step) for step in seen.values()}) == 1
    for place, steps in parts:
        assert samples(place) == {step: seen[step] for step in steps}
        found = losses(place)
        assert sorted(found) == sorted(steps)
        assert np.allclose([found[n] for n in steps], [lost[n] for n in steps], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("streams", "back"),
    [(2, False), (2, True), (None, True)],
)
@pytest.mark.long
def test_from_one_copy_to_two_and_back_nothing_of_the_order_changes(streams, back, tmp_path):
    """Without the key a run has one stream, which both copies then read."""
    whole = straight(tmp_path, data_streams=streams)
    two = goes_on(whole, "two", EVERY, data_parallel_size=2)
    parts = [(two, range(4, 7))]
    if back:
        parts.append((goes_on(two, "again", 2 * EVERY, data_parallel_size=1), range(7, 10)))
    check(parts, whole)
    files = sorted(path.name for path in (tmp_path / saved(6, "two")).glob("train_dataloader_*"))
    assert files == [f"train_dataloader_dprank{n:03d}.json" for n in range(streams or 1)]
    other = whole.after("other", EVERY, steps=2 * EVERY, finetune=False, data_streams=3)
    said = other.train(to=2 * EVERY, code=ConfigError.status)
    assert f"has read {streams or 1} streams of samples, and data_streams is 3" in said


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_two_and_four_copies_from_the_start_are_one(workers, tmp_path):
    one, two, four = (
        straight(tmp_path / str(n), data_streams=4, data_parallel_size=n, num_workers=workers)
        for n in (1, 2, 4)
    )
    for place in (two, four):
        check([(place, range(1, STEPS + 1))], one)
