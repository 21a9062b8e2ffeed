"""What jobs ask a cluster for: refused in planning, reaches each job, and holds up nothing where none is."""

ASKING = {"jobs": {"classes": {"io": {"mem_mb": 10**9, "cpus": 999, "gpus": 99, "partition": "far"}}}}


def test_without_a_cluster_no_job_waits_for_what_it_asks(project):
    project.write("mine/talk.jsonl", "")
    source = {"datasets": {"mine": {"source": {"kind": "chat-jsonl", "path": "mine"}}}}

    project.run("data/raw/mine", config=source | ASKING)

    assert project.plan("data/raw/mine", config=source).nothing


def test_a_run_asks_for_its_nodes_and_one_gpu_a_process(empty_project):
    spread = {
        "runs": {"chat-tiny": {"nodes": 2}},
        "jobs": {"rules": {"train": {"gpu_type": "a100", "account": "us"}}},
    }

    done = empty_project.plan("data/ckpts/chat-tiny/iter_0000050/plait.json", config=spread)

    (asked,) = [line for line in done.text.splitlines() if "gres=" in line]
    for word in ("gres=gpu:a100:1", "nodes=2", "tasks=2", "mpi=srun", "slurm_account=us", "cpus_per_task=1"):
        assert f" {word}," in asked


def test_an_option_that_the_executor_would_refuse_is_refused_in_planning(empty_project):
    text = empty_project.refusal(
        "data/raw/emoji", config={"jobs": {"rules": {"raw": {"slurm_extra": ["--mem=1G"]}}}}
    )

    assert "jobs.rules.raw.slurm_extra.0: '--mem=1G' is not for slurm_extra: use the key mem_mb" in text
