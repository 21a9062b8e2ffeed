"""Jobs of a real Slurm: what they ask for, fail, try again, come as arrays; the driver as one of them."""

import json

import pytest

SMALL = {"runtime": 5, "mem_mb": 600}
SHARDS = 36
"""Some more than ``slurm-array-limit`` of the profile."""
JOBS = {"classes": {"io": SMALL, "cpu": SMALL}}


def dialogue(number):
    turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}."}]
    return json.dumps({"id": str(number), "messages": turns})


def config(lines, *, project, shards=1, **jobs):
    """A data set of these lines, and what its jobs ask for."""
    project.write("mine/talk.jsonl", "".join(f"{line}\n" for line in lines))
    source = {"kind": "chat-jsonl", "path": "mine"}
    return {"datasets": {"mine": {"source": source, "shards": shards}}, "jobs": {**JOBS, **jobs}}


@pytest.fixture(scope="module", autouse=True)
def shards(project_on_slurm, tmp_path_factory):
    """Shards, begun before the other tests; whatever else is in the queue goes before them."""
    project = project_on_slurm(tmp_path_factory.mktemp("shards") / "project")
    polite = {"chat": {"slurm_extra": ["--nice=1000"]}}
    project.run(
        "data/raw/mine",
        config=config(map(dialogue, range(SHARDS)), project=project, shards=SHARDS, rules=polite),
    )
    targets = [f"data/processed/mine/shard_{number:05d}.jsonl.gz" for number in range(SHARDS)]
    driver = project.start(*targets, "--configfile", "overlay.yaml")
    yield project, driver
    driver.kill()


def records(cluster, folder, state):
    """What Slurm recorded of the jobs of a project that ended so, oldest first."""
    return [one for one in cluster.ended() if one["WorkDir"] == str(folder) and one["JobState"] == state]


@pytest.mark.long
def test_a_failing_job_is_tried_again_with_more_memory_and_time_and_its_log_is_named(cluster, project):
    asked = config(["no json"], project=project, rules={"chat": {"partition": "gpu", "mem_mb": 700}})
    project.run("data/raw/mine", config=asked)

    done = project.submit("data/processed/mine/shard_00000.jsonl.gz", config=asked)

    assert done.code == 1, done.text
    failed = records(cluster, project.folder, "FAILED")
    assert [(one["Tres"].split(",")[1], one["TimeLimit"]) for one in failed] == [
        ("mem=700M", "5"), ("mem=1400M", "10"), ("mem=2100M", "15"),
    ]  # fmt: skip
    assert {one["Partition"] for one in failed} == {"gpu"}
    for one in failed:
        log = project.folder / f"data/logs/slurm/rule_chat/mine_00000/{one['JobId']}.log"
        assert log.is_file()
        assert str(log) in done.text
    assert "1 of 1 lines" in done.text
    assert "data/logs/chat/mine/shard_00000.log" in done.text


@pytest.mark.long
def test_the_driver_is_a_job_that_requeues_itself_in_time(cluster, project):
    asked = config([dialogue(1)], project=project, rules={"chat": {"slurm_extra": ["--begin=now+30"]}})
    target = "data/processed/mine/shard_00000.jsonl.gz"
    project.snakemake("-n", target, config=asked)  # writes the config
    words = ["--mem=500", "profiles/slurm/driver.sbatch", target, "--configfile", "overlay.yaml"]
    driver = project.sbatch(*words)

    waiting = cluster.wait(lambda: cluster.queued(project.folder, "rule_chat", "pending"))
    cluster.warn(driver)
    ended = cluster.wait(lambda: cluster.show(driver)["JobState"] in {"COMPLETED", "FAILED"}, 150)

    said = (project.folder / f"plait-driver-{driver}.log").read_text()
    assert ended
    assert cluster.show(driver)["JobState"] == "COMPLETED", said
    assert cluster.show(driver)["Restarts"] == "1"
    assert f"waits for the jobs of its former life: {waiting[0]}" in said
    assert "Nothing to be done" in said
    assert (project.folder / target).is_file()
    assert len(records(cluster, project.folder, "COMPLETED")) == 3  # raw, chat, driver: nothing twice


def test_more_shards_than_an_array_has_room_for_are_two(cluster, shards):
    project, driver = shards

    assert driver.wait(900) == 0, project.said
    ended = records(cluster, project.folder, "COMPLETED")
    tasks = [one for one in ended if "ArrayTaskId" in one]
    assert len(tasks) == len(ended) == SHARDS
    assert len({one["ArrayJobId"] for one in tasks}) == 2
    assert len(list(project.folder.glob("data/processed/mine/*.jsonl.gz"))) == SHARDS
    logs = list(project.folder.glob("data/logs/slurm/rule_chat/mine_*/*.log"))
    assert {log.parent.name for log in logs} == {f"mine_{number:05d}" for number in range(SHARDS)}
    assert {log.stem for log in logs} == {f"{one['ArrayJobId']}_{one['ArrayTaskId']}" for one in tasks}
    assert all(f"shard={log.parent.name[5:]}" in log.read_text() for log in logs)
    ledgers = [json.loads(path.read_text()) for path in project.folder.glob("data/processed/mine/*.json")]
    assert [ledger["kept"] for ledger in ledgers] == [1] * SHARDS
