"""What follows from a config."""

from pathlib import Path

import pytest

from plait import layout
from plait.config import Plan, Schedule, load
from plait.config.model import load_file
from plait.config.plan import INPUTS, SLICES, STAGE_OF, VERSIONS
from plait.config.schedule import train_iters
from plait.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan():
    return Plan(load_file(ROOT / "config/config.yaml"))


@pytest.mark.parametrize(
    ("instances", "size", "epochs", "iterations"),
    [
        (195_122, 128, 1, 1525),
        (445_565, 128, 1, 3481),
        (38_324, 128, 1, 300),
        (4_833, 32, 5, 760),
        (19_379, 32, 5, 3030),
    ],
)
def test_worked_numbers_of_both_systems(instances, size, epochs, iterations):
    assert train_iters(instances=instances, global_batch_size=size, epochs=epochs) == iterations


def test_legal_iterations_of_1525_at_50():
    schedule = Schedule(train_iters=1525, save_interval=50)

    assert schedule.steps() == [*range(50, 1501, 50), 1525]
    assert [step for step in range(2000) if schedule.saves(step)] == schedule.steps()
    assert [schedule.previous(step) for step in (50, 100, 1500, 1525)] == [0, 50, 1450, 1500]
    with pytest.raises(ConfigError, match=r"iteration 77 of run x is never saved.*nearest: 50 or 100"):
        schedule.check(77, run="x")


def test_legal_iterations_by_epoch():
    assert Schedule(train_iters=760, save_interval=152).steps() == [152, 304, 456, 608, 760]


@pytest.mark.parametrize(
    ("epochs", "train_iterations", "known"),
    [(None, 1525, Schedule(1525, 50)), (2, None, None)],
)
def test_a_schedule_waits_for_data_only_where_it_follows_from_them(epochs, train_iterations, known):
    base = load_file(ROOT / "config/config.yaml").model_dump()
    base["runs"]["chat-tiny"] |= {"epochs": epochs, "train_iters": train_iterations}

    assert Plan(load(base)).schedule("chat-tiny") == known


def test_a_chain_starts_from_the_sharded_model(plan):
    def starts(step, schedule=None):
        return str(plan.start(layout.Iteration(run="chat-tiny", iteration=step), schedule))

    assert starts(50) == "data/models/sharded/chat-tiny-megatron-tp1-pp2"
    assert starts(100) == "data/ckpts/chat-tiny/iter_0000050"
    assert starts(101, Schedule(101, 50)) == "data/ckpts/chat-tiny/iter_0000100"


def test_a_saved_schedule_of_other_settings_does_not_count(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"train_iters": 760, "save_interval": 152, "settings": {"epochs": 5}}')

    assert Schedule.read(path) == Schedule(760, 152)
    assert Schedule.read(path, {"epochs": 5}) == Schedule(760, 152)
    assert Schedule.read(path, {"epochs": 6}) is None
    path.write_text('{"train_iters": "many"}')
    with pytest.raises(DataError, match=r"schedule.json is not a schedule"):
        Schedule.read(path)


def test_every_stage_of_an_artifact_has_inputs_a_version_and_settings(plan):
    assert set(STAGE_OF) == set(INPUTS) == set(layout.KINDS)
    assert set(STAGE_OF.values()) | {"verify"} == set(VERSIONS)
    assert set(SLICES) <= set(VERSIONS)
    text = plan.settings_text(layout.Megatron(model="chat-tiny"), "verify")
    assert text == f'{{"stage":"verify","version":{VERSIONS["verify"]}}}'


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"lr": 1.0}, {"train"}),
        ({"exports": [50]}, set()),
        ({"epochs": 3}, {"schedule"}),
        ({"save_interval": 25}, {"schedule"}),
        ({"global_batch_size": 8}, {"schedule", "train"}),
        ({"params_dtype": "bf16"}, {"train"}),
    ],
)
def test_a_changed_key_of_a_run_changes_the_settings_of_its_stages_only(plan, change, stages):
    base = plan.config.model_dump()
    base["runs"]["chat-tiny"] |= change
    other = Plan(load(base))
    asked = {
        "schedule": layout.Run(run="chat-tiny"),
        "train": layout.Iteration(run="chat-tiny", iteration=50),
        "export": layout.Export(run="chat-tiny", step=50),
    }

    changed = {stage for stage, it in asked.items() if plan.settings(it) != other.settings(it)}

    assert changed == stages


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dataset": {}}, "dataset: no such key"),
        ({"datasets": {"a b": {}}}, "datasets"),
        ({"datasets": {"a": {}}}, "either `source` or `pack_together`"),
        ({"models": {"m": {"source": "gone"}}}, "models.m.source names 'gone'"),
        ({"formats": {"f_x": {"tokenizer": "t", "template": "chatml"}}}, "formats"),
    ],
)
def test_a_wrong_config_gets_a_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(values)
