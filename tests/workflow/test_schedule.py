"""Legal iterations: refused exactly as soon as they are known, accepted with a sentence before."""

import json

import pytest

BY_EPOCH = {"runs": {"chat-tiny": {"save_interval": None, "save_every": "epoch", "epochs": 5}}}
ACCEPTED = "any iteration is accepted until data/ckpts/chat-tiny/schedule.json is made"


def measured(project, *, train_iters, save_interval):
    """A project whose data are there and have been counted."""
    shards = [f"megatron_format/chatml_dialogues_pack256/shard_{shard:05d}" for shard in range(2)]
    for made in ("tokenizers/mistral-v1", "tokenizers/mistral-chatml", *shards, "analysis/talk"):
        project.write(f"data/{made}/plait.json", "{}")
    found = {"train_iters": train_iters, "save_interval": save_interval}
    project.write("data/ckpts/chat-tiny/schedule.json", json.dumps(found))
    return project


def trained(plan):
    return [job.split("/")[-2] for job in plan.jobs if job.startswith("train ")]


def test_before_the_data_exist_any_iteration_is_accepted_and_that_is_said(empty_project):
    plan = empty_project.plan("data/ckpts/chat-tiny/hf/model_iter_77")

    assert plan.text.count(ACCEPTED) == 1
    assert trained(plan) == ["iter_0000050", "iter_0000077"]


def test_the_chain_is_listed_from_the_interval_before_the_data_exist(empty_project):
    plan = empty_project.plan("data/ckpts/chat-tiny/hf/model_iter_150")

    assert trained(plan) == ["iter_0000050", "iter_0000100", "iter_0000150"]


def test_1525_iterations_saved_every_50(project):
    measured(project, train_iters=1525, save_interval=50)

    plan = project.plan("data/ckpts/chat-tiny/hf/model_iter_1525")
    text = project.refusal("data/ckpts/chat-tiny/hf/model_iter_1501")

    assert len(trained(plan)) == 31
    assert trained(plan)[-2:] == ["iter_0001500", "iter_0001525"]
    assert ACCEPTED not in plan.text
    assert "(50, 100, 150, ..., 1500, 1525); nearest: 1500 or 1525" in text


def test_760_iterations_saved_by_epoch(project):
    measured(project, train_iters=760, save_interval=152)

    plan = project.plan("data/ckpts/chat-tiny/hf/model_iter_760", config=BY_EPOCH)
    text = project.refusal("data/ckpts/chat-tiny/hf/model_iter_153", config=BY_EPOCH)

    assert trained(plan) == [f"iter_{n:07d}" for n in (152, 304, 456, 608, 760)]
    assert "(152, 304, 456, 608, 760); nearest: 152 or 304" in text


@pytest.mark.parametrize("legal", [152, 304, 456, 608, 760])
def test_the_last_epoch_starts_from_the_one_before(project, legal):
    measured(project, train_iters=760, save_interval=152)
    for step in range(152, legal, 152):
        project.write(f"data/ckpts/chat-tiny/iter_{step:07d}/plait.json", "{}")

    plan = project.plan(f"data/ckpts/chat-tiny/iter_{legal:07d}/plait.json", config=BY_EPOCH)

    assert trained(plan) == [f"iter_{legal:07d}"]
