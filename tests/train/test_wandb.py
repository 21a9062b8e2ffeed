"""Weights & Biases, in its offline mode: what it was told stands in its own files."""

import json
import struct

import pytest
from wandb.proto import wandb_internal_pb2

from plait.config.run import Logging
from plait.errors import ConfigError
from plait.train import wandb
from plait.train.metrics import Metrics

NAMED = {"wandb_project": "p", "wandb_entity": "lab", "wandb_exp_name": "mine", "wandb_tags": ["a", "b"]}
BLOCK, BEFORE = 32768, 7
"""Its log is LevelDB's, after some bytes of its own: blocks of records behind checksum, size and kind."""
WHOLE_OR_LAST = (1, 4)


def records(path):
    data, at, part = path.read_bytes(), BEFORE, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in WHOLE_OR_LAST:
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def told(folder):
    """Runs and rows in the order of their segments."""
    found = [one for path in sorted(folder.glob("wandb/offline-*/*.wandb")) for one in records(path)]
    runs = [one.run for one in found if one.HasField("run")]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in one.history.item}
        for one in found
        if one.HasField("history")
    ]
    return runs, [{key: value for key, value in row.items() if key[0] != "_"} for row in rows]


def test_every_segment_goes_on_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "local-" + "k" * 40)
    logged = Logging(**NAMED).model_dump()
    rows = [{"iteration": n, "lm loss": 10.0 / n} for n in range(1, 6)]
    for start, stop in ((0, 3), (3, 5)):
        with Metrics(tmp_path, start=start, stop=stop, logged=logged) as metrics:
            for row in rows[start:stop]:
                metrics.write(row)

    runs, history = told(tmp_path)

    assert history == rows
    assert len(runs) == 2
    for run in runs:
        assert (run.project, run.entity, run.display_name, [*run.tags]) == ("p", "lab", "mine", ["a", "b"])
        assert run.run_id == (tmp_path / "wandb/run-id").read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"k" * 40 in path.read_bytes()]


def test_who_names_no_project_tells_nobody(tmp_path):
    with Metrics(tmp_path, start=0, stop=1, logged=Logging().model_dump()) as metrics:
        metrics.write({"iteration": 1, "lm loss": 1.0})

    assert not (tmp_path / "wandb").exists()


def test_what_would_fail_at_the_first_iteration_is_refused_before_it(tmp_path, monkeypatch):
    logged = Logging(wandb_project="p").model_dump()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"no key for api\.wandb\.ai was found"):
        wandb.check(logged, here=True)
    (tmp_path / "netrc").write_text("machine wandb.example login user password secret\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    wandb.check(logged, here=True)
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.check(logged, here=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        wandb.check(logged, here=True)
    wandb.check(logged, here=False)
    wandb.check(Logging().model_dump(), here=True)
