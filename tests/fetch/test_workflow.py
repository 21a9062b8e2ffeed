"""The workflow itself, with a hub on this machine: prefetch where there is a network, then none is needed."""

import json
import re
import shutil

import pytest
from hub_server import COMMIT, TOKEN, Hub
from makers import Maker
from projects import Project

CONFIG = {
    "datasets": {
        "talks": {"source": {"kind": "hub", "repo": "us/talks", "files": ["data/*.jsonl"]}},
        "more": {"source": {"kind": "url", "url": "URL/d/more.jsonl"}},
    },
    "raw_hf": {"Tiny-hub": {"kind": "hub", "repo": "us/tiny", "revision": "refs/pr/1"}},
    "models": {"tiny-hub": {"source": "Tiny-hub"}},
}
TARGETS = (
    "data/models/sharded/tiny-hub-megatron-tp2-pp1", "data/processed/talks/shard_00000.jsonl.gz",
    "data/processed/more/shard_00000.jsonl.gz",
)  # fmt: skip
LINE = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'


@pytest.fixture
def hub(tmp_path):
    maker = Maker(tmp_path / "made")
    there = [path for path in maker.hf().iterdir() if path.is_file() and path.name != "plait.json"]
    hub = Hub(
        repos={
            "models/us/tiny": {path.name: path.read_bytes() for path in there},
            "datasets/us/talks": {"data/a.jsonl": LINE * 3, "data/b c.jsonl": LINE, "README.md": b""},
        },
        urls={"/d/more.jsonl": LINE * 2},
        gated={"models/us/tiny"},
    ).start()
    yield hub
    hub.stop()


@pytest.fixture
def project(hub, tmp_path, monkeypatch):
    for name, value in {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    project = Project.make(tmp_path / "project")
    config = json.loads(json.dumps(CONFIG).replace("URL", hub.url))
    return project, config


def test_prefetch_then_no_network(project, hub, monkeypatch):
    project, config = project
    planned = project.plan(*TARGETS, config=config)
    assert "models/us/tiny@refs/pr/1 is not locked yet: a job asks the hub first." in planned.text
    assert planned.rules["lock"] == 2
    assert "raw" in planned.rules
    assert hub.requests == [], "a dry run asks nobody"

    done = project.run("prefetch", config=config)
    assert re.search(
        r"raw_hf\.Tiny-hub: models/us/tiny@refs/pr/1 at 0123456789ab: \d+ files, .* 0 of them are here",
        done.text,
    )
    assert f"datasets.more: {hub.url}/d/more.jsonl: 1 files" in done.text
    lock = json.loads((project.folder / "config/hub.lock.json").read_text())
    assert set(lock) == {"models/us/tiny@refs/pr/1", "datasets/us/talks@main", f"{hub.url}/d/more.jsonl"}
    assert project.plan("prefetch", config=config).nothing
    asked = len(hub.requests)
    planned = project.plan(*TARGETS, config=config)
    assert not {"lock", "fetch"} & set(planned.rules)

    hub.stop()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN")
    project.run(*TARGETS, config=config)
    assert project.plan(*TARGETS, config=config).nothing
    assert len(hub.requests) == asked
    manifest = json.loads((project.folder / "data/models/raw_hf/Tiny-hub/plait.json").read_text())
    assert manifest["settings"]["commit"] == manifest["facts"]["commit"] == COMMIT
    assert (
        json.loads((project.folder / "data/processed/talks/shard_00000.ledger.json").read_text())["kept"] == 4
    )

    everything = [path for path in project.folder.rglob("*") if path.is_file()]
    assert len(everything) > 50
    assert not [path for path in everything if TOKEN.encode() in path.read_bytes()], "the token is nowhere"
    assert TOKEN not in done.text
    hub.start()


def test_a_grid_is_refused_as_soon_as_the_config_is_fetched(project, hub):
    project, config = project
    project.run("prefetch", config=config)
    said = project.refusal("data/models/sharded/tiny-hub-megatron-tp3-pp1", config=config)
    assert "grid tp3 x pp1 cannot hold tiny-hub: num_attention_heads 4 is not a multiple of tp 3" in said


def test_a_failed_fetch_goes_on_in_the_next_run_and_another_clone_starts_from_the_lock(
    project, hub, tmp_path
):
    project, config = project
    hub.faults.cuts, hub.faults.statuses = [20_000], [None, 403]
    weights = f"data/hub/models--us--tiny/{COMMIT}/model.safetensors"
    project.run("data/hub/models--us--tiny/refs%2Fpr%2F1.json", config=config)
    failed = project.snakemake("--cores", "1", weights, config=config)
    assert failed.code == 1
    assert "cannot be fetched: status 403" in failed.text
    project.run(weights, config=config)
    assert hub.files_asked()[-1][1] == "bytes=20000-"

    other = Project.make(tmp_path / "other")
    shutil.copy(project.folder / "config/hub.lock.json", other.folder / "config")
    assert other.plan("data/models/raw_hf/Tiny-hub", config=config).rules.keys() == {"fetch", "model"}
    hub.repos["models/us/tiny"]["model.safetensors"] = b"changed on the hub"
    said = other.snakemake("--cores", "1", weights, config=config)
    assert said.code == 1
    assert "came twice as something else" in said.text


def test_a_pattern_without_files_is_refused_with_what_there_is(project, hub):
    project, config = project
    config["datasets"]["talks"]["source"]["files"] = ["data/*.parquet"]
    project.run("data/hub/datasets--us--talks/main.json", config=config)
    said = project.refusal("data/raw/talks", config=config)
    assert "datasets.talks: us/talks at 0123456789ab has no file 'data/*.parquet'" in said
    assert "it has README.md, data/a.jsonl" in said
