"""The user's own files: another size or another file makes a raw source again, touching plans nothing."""

import json
import os

import pytest
from projects import Project

RECORD = json.dumps(
    {
        "id": "a",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    }
)
CONFIG = {"datasets": {"mine": {"source": {"kind": "chat-jsonl", "path": "records"}}}}
SHARD = "data/processed/mine/shard_00000.jsonl.gz"
AFTER = {"raw": 1, "chat": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    project = Project.make(tmp_path_factory.mktemp("sources") / "project")
    project.write("records/a.jsonl", f"{RECORD}\n{RECORD}\n")
    project.write("records/b.jsonl", f"{RECORD}\n")
    project.run(SHARD, config=CONFIG)
    return project


@pytest.fixture
def copy(made, tmp_path):
    return made.copy(tmp_path / "copy")


def test_touching_moving_and_notes_beside_the_files_plan_nothing(copy):
    for path in sorted((copy.folder / "records").iterdir()):
        os.utime(path)
    copy.write("records/notes.txt", "mine")

    assert copy.plan(SHARD, config=CONFIG).nothing


CHANGES = {
    "appended": lambda records: (records / "a.jsonl").write_text(f"{RECORD}\n" * 3),
    "added": lambda records: (records / "c.jsonl").write_text(f"{RECORD}\n"),
    "removed": lambda records: (records / "b.jsonl").unlink(),
    "renamed": lambda records: (records / "b.jsonl").rename(records / "c.jsonl"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_make_the_source_again(name, copy):
    CHANGES[name](copy.folder / "records")

    assert copy.plan(SHARD, config=CONFIG).rules == AFTER


def test_an_appended_line_reaches_the_shard(copy):
    CHANGES["appended"](copy.folder / "records")

    copy.run(SHARD, config=CONFIG)

    ledger = json.loads((copy.folder / "data/processed/mine/shard_00000.ledger.json").read_text())
    assert ledger["kept"] == 4
    assert copy.plan(SHARD, config=CONFIG).nothing
