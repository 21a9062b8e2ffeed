"""Whatever a config value holds reaches its stage as it is, and no shell reads it."""

import json

HOSTILE = """it's a "name"; $(touch hacked) `touch hacked` {input} & \\ 日本語.jsonl"""
RECORD = {
    "id": "a",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
}


def test_a_hostile_path_is_only_a_path(project):
    project.write(HOSTILE, json.dumps(RECORD) + "\n")
    source = {"kind": "chat-jsonl", "path": HOSTILE}

    project.run("data/processed/mine/shard_00000.jsonl.gz", config={"datasets": {"mine": {"source": source}}})

    manifest = json.loads((project.folder / "data/raw/mine/plait.json").read_text())
    ledger = json.loads((project.folder / "data/processed/mine/shard_00000.ledger.json").read_text())
    assert manifest["settings"]["source"]["path"] == HOSTILE
    assert (ledger["read"], ledger["kept"]) == (1, 1)
    assert not list(project.folder.rglob("hacked"))
