"""Many shards a job: targets, files and proofs are those of one shard a job, and the cut remakes nothing."""

import json

import pytest
from projects import Project, contents

from plait import files

ANALYSIS = "data/analysis/many/plait.json"
SHARD = "data/processed/many/shard_00004.jsonl.gz"
INDEXED = "data/megatron_format/chatml_many_pack256/shard_00001/plait.json"
BATCHES = ("data/processed/many/.batches", "data/megatron_format/chatml_many_pack256/.batches")
OTHERS = {"raw": 1, "tokenizer": 2, "analyse": 1}


def cut(number, **keys):
    source = {"kind": "chat-jsonl", "path": "records.jsonl"}
    many = {"source": source, "shards": 7, "shards_per_job": number, **keys}
    return {
        "datasets": {"many": many},
        "mixtures": {"many": {"format": "chatml", "pack": 256, "datasets": ["many"]}},
    }


def with_records(folder):
    project = Project.make(folder)
    talk = [[("user", f"Question {n}"), ("assistant", f"Answer {n}.")] for n in range(21)]
    lines = [json.dumps([{"role": role, "content": text} for role, text in one]) for one in talk]
    project.write("records.jsonl", "\n".join(lines))
    return project


def made(project):
    """What was made, without batches, logs and what Snakemake leaves there."""
    found = contents(project.folder / "data")
    apart = (".batches/", "data/logs/", "data/benchmarks/", ".snakemake_timestamp")
    named = {path.removeprefix(f"{project.folder}/"): it for path, it in found.items()}
    return {path: it for path, it in named.items() if not any(one in path for one in apart)}


def test_a_plan_has_few_jobs_and_names_no_shard_twice(empty_project):
    fresh = with_records(empty_project.folder.parent / "fresh")

    assert fresh.plan(ANALYSIS, config=cut(3)).rules == {"chat_batch": 3, "index_batch": 3, **OTHERS}
    mixed = fresh.plan(ANALYSIS, SHARD, INDEXED, config=cut(4)).rules
    # Shards 1 and 4 alone, their neighbours in pieces: 0, 2-3 and 5-6 of the records.
    assert mixed == {"chat": 2, "chat_batch": 3, "index": 1, "index_batch": 3, **OTHERS}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A mixture of seven shards, three a job."""
    project = with_records(tmp_path_factory.mktemp("together") / "project")
    project.run(ANALYSIS, config=cut(3))
    return project


@pytest.mark.long
def test_what_jobs_of_three_make_is_what_jobs_of_one_make(together, tmp_path):
    alone = with_records(tmp_path / "alone")
    alone.run(ANALYSIS, config=cut(1))

    assert made(together) == made(alone)
    assert len([path for path in made(alone) if path.endswith("plait.json")]) == 1 + 2 + 7 + 1
    for number in (1, 3):
        assert alone.plan(ANALYSIS, config=cut(number)).nothing
    changed = alone.plan(ANALYSIS, config=cut(3, reject_limit=0.5)).rules
    assert changed == {"chat_batch": 3, "index_batch": 3, "analyse": 1}


@pytest.mark.long
def test_the_number_of_shards_a_job_changes_no_plan(together):
    for number in (1, 2, 3, 100):
        assert together.plan(ANALYSIS, SHARD, INDEXED, config=cut(number)).nothing
    (together.folder / "data/raw/many/plait.json").touch()
    assert together.plan(ANALYSIS, config=cut(3)).nothing
    assert together.plan(SHARD, INDEXED, config=cut(3, reject_limit=0.5)).rules == {"chat": 2, "index": 1}


@pytest.mark.long
def test_what_is_missing_or_killed_is_made_again_and_nothing_else(together, tmp_path):
    copy = together.copy(tmp_path / "copy")
    assert copy.plan(ANALYSIS, config=cut(3)).nothing
    before = made(copy)
    for path in (
        SHARD,
        SHARD.replace(".jsonl.gz", ".ledger.json"),
        *(f"{one}/00003-00005.json" for one in BATCHES),
    ):
        files.remove(copy.folder / path)
    files.remove((copy.folder / INDEXED).parent)
    assert copy.plan(ANALYSIS, config=cut(3)).nothing  # nobody asks for what all is made of already
    files.remove((copy.folder / ANALYSIS).parent)
    kept = copy.folder / SHARD.replace("4", "5")
    when = kept.stat().st_mtime_ns

    done = copy.run(ANALYSIS, config=cut(3))

    assert done.rules == {"chat_batch": 1, "index_batch": 2, "analyse": 1}
    assert made(copy) == before
    assert kept.stat().st_mtime_ns == when
