import json
import logging

import pytest
import yaml

from plait import files
from plait.cli.main import main
from plait.config.schedule import Schedule

RUN = {
    "recipe": "solo", "epochs": 1, "train_iters": None, "save_interval": 50, "save_every": None,
    "global_batch_size": 128, "train_tokens": None, "seq_length": 256,
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/analysis/m"
    folder.mkdir(parents=True)

    def analysed(instances):
        (folder / "mixture.yaml").write_text(yaml.safe_dump({"total_instances": instances, "sources": []}))
        files.write_manifest(folder, kind="analysis", settings={}, facts={})
        return "data/analysis/m"

    return analysed


def schedule(analysis, run, target="data/ckpts/r/schedule.json"):
    return main(["schedule", analysis, target, "--settings", json.dumps(run)])


@pytest.mark.parametrize(
    ("instances", "size", "epochs", "total"),
    [
        (195_122, 128, 1, 1525),
        (445_565, 128, 1, 3481),
        (38_324, 128, 1, 300),
        (4_833, 32, 5, 760),
        (19_379, 32, 5, 3030),
    ],
)
def test_iterations_are_those_of_the_original_systems(workplace, caplog, instances, size, epochs, total):
    caplog.set_level(logging.INFO)

    assert schedule(workplace(instances), RUN | {"global_batch_size": size, "epochs": epochs}) == 0

    found = Schedule.read("data/ckpts/r/schedule.json")
    assert (found.train_iters, found.save_interval) == (total, 50)
    assert f"train_iters = ({instances} // {size} + 1) * {epochs} = {total}" in caplog.text


def test_a_checkpoint_an_epoch(workplace):
    run = RUN | {"global_batch_size": 32, "epochs": 5, "save_interval": None, "save_every": "epoch"}

    assert schedule(workplace(4_833), run) == 0
    assert Schedule.read("data/ckpts/r/schedule.json").steps() == [152, 304, 456, 608, 760]


def test_given_iterations_stay(workplace):
    assert schedule(workplace(10), RUN | {"epochs": None, "train_iters": 77}) == 0
    assert Schedule.read("data/ckpts/r/schedule.json").steps() == [50, 77]


def test_a_schedule_says_what_it_was_made_from(workplace):
    analysis = workplace(10)
    schedule(analysis, RUN)

    found = files.read_json("data/ckpts/r/schedule.json")
    assert found["settings"] == RUN
    assert found["inputs"] == {analysis: files.digest_of_input(analysis)}


def test_mistakes_have_a_sentence(workplace, capsys):
    assert schedule(workplace("many"), RUN) == 2
    assert "total_instances" in capsys.readouterr().err
    assert schedule(workplace(1), RUN, target="data/ckpts/r/plan.json") == 2
    assert "data/ckpts/r/schedule.json" in capsys.readouterr().err


def test_llava_counts_the_batches_that_fit_whole(workplace, caplog):
    caplog.set_level("INFO")
    run = RUN | {"recipe": "llava_jp", "epochs": 2, "global_batch_size": 256}
    assert schedule(workplace(1000), run) == 0
    assert "train_iters = 1000 // 256 * 2 = 6" in caplog.text


def test_llava_trains_at_least_an_iteration_an_epoch(workplace, caplog):
    caplog.set_level("INFO")
    assert schedule(workplace(100), RUN | {"recipe": "llava", "epochs": 3}) == 0
    assert Schedule.read("data/ckpts/r/schedule.json").train_iters == 3
    assert "train_iters = max(100 // 128, 1) * 3 = 3" in caplog.text


def test_tokens_are_iterations_of_whole_batches(workplace):
    run = RUN | {"epochs": None, "train_tokens": 1_000_000}

    assert schedule(workplace(7), run) == 0
    assert Schedule.read("data/ckpts/r/schedule.json").train_iters == -(-1_000_000 // (128 * 256))
