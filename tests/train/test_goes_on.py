"""A run that goes on where another stopped: with its optimizer or a new one, by keys of its own."""

import json

import numpy as np
import pytest
from test_loop import STEPS, lr_at, model, plainly  # noqa: F401 - a fixture
from test_resume import DISTRIBUTED, segment

from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

STOP = 3


def rows_of(model, root, keys, *, grid=Grid(), copies=1, always=()):  # noqa: F811, B008
    """The metrics of three iterations by the keys of the loop, and of others by keys in place of these."""
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    always = dict(always)
    for start, stop, own in ((0, STOP, always), (STOP, STEPS, always | keys)):
        arguments = model.state_dict(), config, grid, root, start, stop, own
        run_ranks(segment, grid, *arguments, copies=copies)
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def of(rows, name):
    return np.array([row[name] for row in rows])


WORLDS = {
    "one process": {},
    "two stages": {"grid": Grid(1, 2)},
    "a shared optimizer": {"copies": 2, "always": DISTRIBUTED},
}

EACH = pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.long if one == "two stages" else ()) for one in WORLDS]
)


@EACH
def test_an_optimizer_that_is_left_behind_begins_anew(model, name, tmp_path):  # noqa: F811
    rows = rows_of(model, tmp_path, {"load_optim": False}, **WORLDS[name])

    def anew(step, optimizer):
        return (
            type(optimizer)(optimizer.param_groups, lr=0.0, betas=(0.9, 0.95), eps=1e-5)
            if step == STOP
            else optimizer
        )

    losses, norms, _ = plainly(model, before=anew)
    assert np.allclose(of(rows, "lm loss"), losses, atol=1e-5, rtol=0)
    assert np.allclose(of(rows, "grad norm"), norms, atol=1e-5, rtol=1e-5)
    assert np.allclose(of(rows, "learning-rate"), [lr_at(step) for step in range(STEPS)])
    with_its_own, _, _ = plainly(model)
    assert abs(with_its_own[-1] - losses[-1]) > 1e-3


@EACH
def test_what_its_keys_say_is_not_taken_from_where_it_goes_on(model, name, tmp_path):  # noqa: F811
    keys = {"lr": 3e-3, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_eps": 1e-3}
    rows = rows_of(model, tmp_path, keys, **WORLDS[name])

    def by_keys(step, optimizer):
        for group in optimizer.param_groups if step == STOP else ():
            group |= {"betas": (0.5, 0.95), "eps": 1e-3, "weight_decay": 5 * group["weight_decay"]}
        return optimizer

    def lr(step):
        return lr_at(step) if step < STOP else lr_at(step, 3e-3)

    losses, norms, _ = plainly(model, before=by_keys, lr=lr)
    assert np.allclose(of(rows, "learning-rate"), [lr(step) for step in range(STEPS)])
    assert np.allclose(of(rows, "lm loss"), losses, atol=1e-5, rtol=0)
    assert np.allclose(of(rows, "grad norm"), norms, atol=1e-5, rtol=1e-5)


def test_a_new_optimizer_of_bf16_weights_begins_from_these(model, tmp_path):  # noqa: F811
    """Its masters are what the checkpoint has, and not what the process was started with."""
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    run_ranks(segment, Grid(), model.state_dict(), config, Grid(), tmp_path, 0, STOP)
    again = {"load_optim": False, "params_dtype": "bf16", "lr": 1e-7, "min_lr": 0.0}
    run_ranks(segment, Grid(), {}, config, Grid(), tmp_path, STOP, STEPS, again)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses, _, _ = plainly(model, lr=lambda step: lr_at(step) if step < STOP else 0.0)
    assert np.allclose(of(rows, "lm loss"), losses, atol=3e-2, rtol=0)
