"""A source that a Python file of the user's reads, through the workflow."""

import json

import pytest
from projects import Project

READER = """
def read(record, pictures):
    return [{"from": "human", "value": record["ask"]}, {"from": "gpt", "value": record["say"]}]
"""
SHARD = "data/processed/mine/shard_00001.jsonl.gz"
CONFIG = {
    "datasets": {"mine": {"source": {"kind": "files", "path": "my", "shape": "my_reader.py"}, "shards": 2}}
}


@pytest.mark.long
def test_another_text_of_the_file_makes_the_data_again(tmp_path):
    project = Project.make(tmp_path / "project")
    (project.folder / "my").mkdir()
    rows = [json.dumps({"ask": f"q{n}", "say": f"a{n}"}) for n in range(4)]
    (project.folder / "my/a.jsonl").write_text("\n".join(rows))
    reader = project.folder / "my_reader.py"
    reader.write_text(READER)

    done = project.snakemake("--cores", "1", SHARD, config=CONFIG)
    assert done.code == 0, done.text
    again = project.snakemake("-n", "--cores", "1", SHARD, config=CONFIG)
    assert again.jobs == []

    reader.write_text(READER.replace("human", "user"))
    changed = project.snakemake("-n", "--cores", "1", SHARD, config=CONFIG)
    assert sorted(job.split()[0] for job in changed.jobs) == ["chat", "raw"]

    reader.write_text("def read(record pictures):\n")
    broken = project.snakemake("--cores", "1", SHARD, config=CONFIG)
    assert broken.code == 1
    log = (project.folder / "data/logs/raw/mine.log").read_text()
    assert "error: my_reader.py cannot be used: SyntaxError" in log
    assert "Traceback" not in log
