"""What jobs ask a cluster for: defaults, what config/ says over them, and what no job may ask."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm.validation import get_forbidden_slurm_options, validate_slurm_extra

from plait.config import Plan, load
from plait.config.jobs import CLASSES, RULES, SLURM_LOGS, TAKEN, link_array_log
from plait.errors import ConfigError

ONE = {"processes": 0, "nodes": 1, "attempt": 1, "escalates": True}


class Words(dict):
    """Resources as the executor reads them: by key and by attribute."""

    __getattr__ = dict.get


def sbatch(resources, threads=1):
    """The words that the executor itself makes of these resources."""
    job = SimpleNamespace(resources=Words(resources), threads=threads)
    validate_slurm_extra(job)
    params = {"run_uuid": "x", "slurm_logfile": "x", "comment_str": "x", "account": "", "partition": "",
              "workdir": ""}  # fmt: skip
    return get_submit_command(job, params).partition("--comment x")[2].split() + set_gres_string(job).split()


def asked(rule, jobs=None, **sizes):
    return load({"jobs": jobs or {}}).jobs.by_rule[rule].resources(**ONE | sizes)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_asks_for_time_and_memory_of_its_class_or_more(rule):
    mine, of_class = asked(rule), CLASSES[RULES[rule]]

    assert mine["runtime"] == of_class["runtime"]
    assert mine["mem_mb"] >= of_class["mem_mb"]
    assert mine.keys() == {"runtime", "mem_mb"}


def test_a_rule_goes_over_its_class_key_by_key_and_null_leaves_a_key_out():
    jobs = {
        "classes": {"cpu": {"partition": "long", "account": "us", "mem_mb": 5}},
        "rules": {"chat": {"partition": "short", "runtime": None}},
    }

    assert asked("chat", jobs) == {"slurm_partition": "short", "slurm_account": "us", "mem_mb": 5}
    assert asked("index", jobs)["slurm_partition"] == "long"
    assert "slurm_partition" not in asked("raw", jobs)


def test_another_attempt_asks_for_more():
    assert [asked("chat", attempt=n)["mem_mb"] for n in (1, 2, 3)] == [16000, 32000, 48000]
    assert [asked("chat", attempt=n)["runtime"] for n in (1, 2, 3)] == [240, 480, 720]
    assert asked("train", attempt=3, escalates=False, processes=2)["runtime"] == 1440


@pytest.mark.parametrize(
    ("processes", "nodes", "jobs", "words"),
    [
        (2, 1, {}, ["--nodes=1", "--cpus-per-task=2", "--gres=gpu:2"]),
        (2, 1, {"gpus": 0}, ["--ntasks=1", "--cpus-per-task=2"]),
        (16, 2, {"gpu_type": "a100"}, ["--nodes=2", "--ntasks=2", "--cpus-per-task=8", "--gres=gpu:a100:8"]),
        (16, 2, {"cpus": 64}, ["--nodes=2", "--ntasks=2", "--cpus-per-task=64", "--gres=gpu:8"]),
        (4, 2, {"gpus": 0}, ["--nodes=2", "--ntasks=2", "--cpus-per-task=2"]),
    ],
)
def test_a_run_has_one_task_a_node_and_a_gpu_a_process(processes, nodes, jobs, words):
    found = sbatch(asked("train", {"classes": {"gpu": jobs}}, processes=processes, nodes=nodes), processes)

    assert [word for word in found if "=" in word] == words


def test_the_rest_reaches_sbatch():
    jobs = {"rules": {"export": {
        "qos": "high", "constraint": "a100&ib", "exclusive": True, "reservation": "ours", "gpus": 1,
        "slurm_extra": ["--nodelist=n[1-4]", "--mail-type=FAIL"],
    }}}  # fmt: skip

    line = " ".join(sbatch(asked("export", jobs)))

    assert "-C 'a100&ib' --qos=high" in line
    assert "--exclusive --reservation=ours '--nodelist=n[1-4]' --mail-type=FAIL" in line
    assert "--gres=gpu:1" in line


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("--mem=10G", "'--mem=10G' is not for slurm_extra: use the key mem_mb"),
        ("--part=gpu", "'--part=gpu' is not for slurm_extra: use the key partition"),
        ("--exclusive", "use the key exclusive"),
        ("--chdir=/", "Snakemake sets it, or needs it as it is"),
        ("--nodelist=rack-J1", "Snakemake takes for the name of a job"),
        ("-N 2", "is not one option of sbatch"),
        ("--nodelist n1", "is not one option of sbatch"),
        ("--hint=$(id)", "is not one option of sbatch"),
        ("--hint=a;id", "is not one option of sbatch"),
        ("--hint=a\nid", "is not one option of sbatch"),
        ("--hint='a'", "is not one option of sbatch"),
    ],
)
def test_extra_options_are_refused_in_a_sentence(extra, sentence):
    with pytest.raises(ConfigError) as refused:
        load({"jobs": {"rules": {"train": {"slurm_extra": [extra]}}}})

    assert str(refused.value).startswith("jobs.rules.train.slurm_extra.0: ")
    assert sentence in str(refused.value)


def test_what_the_executor_refuses_is_refused_before():
    long = [word[2:].split("[")[0] for key in get_forbidden_slurm_options() for word in key.split("|")
            if word.startswith("--")]  # fmt: skip

    assert len(long) > 20
    assert not set(long) - TAKEN.keys()


def test_a_rule_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"there is no rule 'drain'; rules are raw, .*train"):
        load({"jobs": {"rules": {"drain": {}}}})


@pytest.mark.parametrize("key", ["partition", "account", "qos", "reservation", "gpu_type", "constraint"])
@pytest.mark.parametrize("value", ["a b", "$(id)", "a;b", "", "-x"])
def test_names_are_single_words(key, value):
    with pytest.raises(ConfigError):
        load({"jobs": {"classes": {"gpu": {key: value}}}})


def test_jobs_change_nothing_of_what_is_made(tmp_path):
    from plait import layout

    config = {"datasets": {"d": {"source": {"kind": "chat-jsonl", "path": str(tmp_path)}}}}
    with_jobs = config | {"jobs": {"rules": {"chat": {"mem_mb": 1}}}}
    chat = layout.Chat(dataset="d", shard=0)

    first, second = (Plan(load(one)).settings_text(chat) for one in (config, with_jobs))
    assert first == second


def test_the_log_of_an_arrays_task_is_linked_where_a_failure_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    for environ in ({}, task | {"SLURM_JOB_NODELIST": "n1"}):
        link_array_log("chat", ["mine", "00002"], environ)
        assert not list(tmp_path.iterdir())

    for _ in range(2):
        link_array_log("chat", ["mine", "00002"], task)

    link = tmp_path / "data/logs/slurm/rule_chat/mine_00002/7_3.log"
    assert link.readlink().as_posix() == "../7_3.log"


def test_logs_are_linked_where_the_profile_has_them_written():
    profile = yaml.safe_load((Path(__file__).parents[2] / "profiles/slurm/config.yaml").read_text())

    assert profile["slurm-logdir"] == str(SLURM_LOGS)
    assert set(profile["slurm-array-jobs"].split(",")) <= set(RULES)
