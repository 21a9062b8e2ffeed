"""The mixture that a run consumed: counted by hand from written logs, and from what real runs leave."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from plait import files
from plait.cli.main import main
from plait.tokens.made_by import made_by

sys.path.append(str(Path(__file__).parents[1] / "train"))
from jobs import STEPS, packed, pictured
from talks import KEYS, exchange

A, B = (f"data/megatron_format/f_{name}_pack64/shard_00000" for name in "ab")
RUN = {
    "start_run": None, "start_iteration": None, "finetune": True, "global_batch_size": 4, "seed": 1,
    "skip_train_iteration_range": ["2-2"],
}  # fmt: skip


def written(root, logs, *, sources, steps=4, **keys):
    """A run that exists as its log only, in the working folder."""
    analysis, run = root / "data/analysis/x", root / "data/ckpts/r"
    analysis.mkdir(parents=True)
    (run / "samples").mkdir(parents=True)
    mixed = {"sources": [{"prefix": one, "weight": weight} for one, weight in sources.items()]}
    mixed |= keys.pop("mixed", {})
    (analysis / "mixture.yaml").write_text(yaml.safe_dump(mixed))
    files.write_manifest(analysis, kind="analysis", settings={}, facts={})
    files.write_json(run / "schedule.json", {"train_iters": steps, "save_interval": steps})
    digest = files.digest_of_input(analysis)
    told = {"analysis": "data/analysis/x", "digest": digest, "settings": RUN | keys}
    files.write_json(run / "samples/job.json", told)
    for name, rows in logs.items():
        (run / "samples" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step, copy, copies, *samples, **more):
    place = {"micro_batch_size": 1, "copy": copy, "copies": copies}
    return {"iteration": step, **place, **more, "samples": samples}


def audited(capsys):
    assert main(["audit", "r", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_shares_are_those_counted_by_hand(here, capsys):
    """Two copies trained two steps; one went on alone: 9 of 16 are of a, 8 of the 12 not skipped."""
    logs = {
        "dp_000.jsonl": [
            row(1, 0, 2, [0, 1], [0, 2]),
            row(2, 0, 2, [1, 1], [1, 2], skipped=True),
            row(3, 0, 1, [0, 5], [0, 6], [1, 5], [1, 6]),
            row(4, 0, 1, [0, 7], [0, 8], [0, 9], [1, 7]),
        ],
        "dp_001.jsonl": [row(1, 1, 2, [0, 3], [1, 3]), row(2, 1, 2, [0, 4], [1, 4], skipped=True)],
    }
    written(here, logs, sources={A: 0.5, B: 0.5})
    found = audited(capsys)

    assert (found["consumed"], found["trained"], found["missing"]) == (16, 12, 0)
    assert found["steps"] == [1, 4]
    a, b = found["datasets"]["a"], found["datasets"]["b"]
    assert (a["consumed"], a["trained"], b["consumed"], b["trained"]) == (9, 8, 7, 4)
    assert a["consumed_deviation"] == pytest.approx(9 / 16 - 1 / 2)
    assert b["trained_deviation"] == pytest.approx(4 / 12 - 1 / 2)
    assert found["largest"]["dataset"] in {"a", "b"}
    assert abs(found["largest"]["deviation"]) == pytest.approx(1 / 6)
    assert files.read_json("data/ckpts/r/audit.json") == found
    assert main(["audit", "r"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "r, steps 1 to 4: 12 sequences trained, 4 consumed and left out by skip_train_iteration_range"
    )
    assert said[1] == "a: planned 0.5000, trained 0.6667 (+0.1667), consumed 0.5625 (+0.0625)"
    assert said[-1].startswith("largest deviation from the mixture: ")


def test_samples_of_energon_count_for_the_dataset_of_their_tar(here, capsys):
    places = [f"data/energon/{name}/wds/pretrain-0.tar/{key}" for name, key in ("a1", "b2", "a3", "a4")]
    logs = {"dp_000.jsonl": [row(1, 0, 1, *places), row(3, 0, 1, *places)]}
    sources = {"data/energon/a": 0.6, "data/energon/b": 0.4}
    written(here, logs, sources=sources, mixed={"tokenizer": "t"}, skip_train_iteration_range=[])
    found = audited(capsys)

    assert (found["consumed"], found["missing"], found["steps"]) == (8, 1, [1, 3])
    assert found["datasets"]["a"]["trained_share"] == 0.75
    assert main(["audit", "r"]) == 0
    assert "; nothing tells of 1 of the steps" in capsys.readouterr().out


def test_a_run_that_goes_on_answers_for_its_own_steps(here, capsys):
    logs = {"dp_000.jsonl": [row(3, 0, 1, *[[1, n] for n in range(4)])]}
    goes_on = {"start_run": "q", "start_iteration": 2, "finetune": False}
    written(here, logs, sources={A: 0.5, B: 0.5}, **goes_on)
    found = audited(capsys)

    assert (found["steps"], found["consumed"]) == ([3, 3], 4)
    assert found["datasets"]["b"]["trained_share"] == 1


def test_what_is_not_there_is_said(here, capsys):
    written(here, {}, sources={A: 0.5, B: 0.5})
    assert main(["audit", "q"]) == 2
    assert "there is no data/ckpts/q" in capsys.readouterr().err
    assert main(["audit", "r"]) == 2
    assert "data/ckpts/r was not trained yet" in capsys.readouterr().err
    (here / "data/analysis/x/plait.json").unlink()
    assert main(["audit", "r"]) == 2
    assert "data/analysis/x is gone" in capsys.readouterr().err


@pytest.mark.long
def test_a_real_run_in_two_jobs_is_audited_at_its_end(tmp_path, monkeypatch, capsys):
    """48 draws of 3 : 1 are 36 and 12; two steps are skipped, and half of the log is lost afterwards."""
    place = packed(tmp_path, global_batch_size=2, hidden_dropout=0.0, skip_train_iteration_range=["5-6"])
    first = "data/megatron_format/f_d_pack64/shard_00000"
    second = first.replace("f_d", "f_e")
    shutil.copytree(tmp_path / first, tmp_path / second)
    analysis = tmp_path / "data/analysis/x"
    sources = [{"prefix": first, "weight": 0.75}, {"prefix": second, "weight": 0.25}]
    (analysis / "mixture.yaml").write_text(yaml.safe_dump({"sources": sources}))
    files.write_manifest(analysis, kind="analysis", settings={}, facts={})
    schedule = {"train_iters": STEPS, "save_interval": STEPS // 2}
    (place.ckpts / "schedule.json").write_text(json.dumps(schedule))
    place.train(to=STEPS // 2)
    assert not (place.ckpts / "audit.json").exists()
    said = place.train(after=STEPS // 2)

    monkeypatch.chdir(tmp_path)
    found = files.read_json("data/ckpts/r/audit.json")
    assert (found["consumed"], found["trained"], found["missing"]) == (48, 44, 0)
    assert {name: one["consumed"] for name, one in found["datasets"].items()} == {"d": 36, "e": 12}
    assert found["datasets"]["e"]["trained"] == 12 - logged(place, (5, 6))[1]
    assert f"largest deviation from the mixture: {found['largest']['dataset']}" in said
    log = place.ckpts / "samples/dp_000.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[10:]))
    assert audited(capsys) == found


def logged(place, steps):
    """How often each source is in the log of some steps."""
    lines = (place.ckpts / "samples/dp_000.jsonl").read_text().splitlines()
    rows = [one for one in map(json.loads, lines) if one["iteration"] in steps]
    return Counter(source for one in rows for source, _ in one["samples"])


@pytest.mark.long
def test_a_real_run_over_energon_is_audited(tmp_path, monkeypatch, capsys):
    from plait.data import energon

    place = pictured(tmp_path, data_parallel_size=2, skip_train_iteration_range=["5-6"])
    datasets = {f"data/energon/{name}": weight for name, weight in (("d", 0.75), ("e", 0.25))}
    (tmp_path / "data/energon/e").mkdir()
    energon.build(tmp_path / "data/energon/e", (exchange(n) for n in range(40, 80)), KEYS)
    analysis = tmp_path / "data/analysis/x"
    mixed = yaml.safe_load((analysis / "mixture.yaml").read_text())
    mixed["sources"] = [{"prefix": one, "weight": weight} for one, weight in datasets.items()]
    mixed["made_by"] = made_by(tmp_path / mixed["tokenizer"], mixed["format"]["template"])
    (analysis / "mixture.yaml").write_text(yaml.safe_dump(mixed))
    monkeypatch.chdir(tmp_path)
    blend = energon.blend(datasets, relative_to=Path("data/analysis/x"))
    (analysis / "metadataset.yaml").write_text(yaml.safe_dump(blend))
    files.write_manifest(analysis, kind="analysis", settings={}, facts={})
    place.train()

    found = audited(capsys)
    text = [path.read_text() for path in sorted(Path("data/ckpts/r/samples").glob("dp_*"))]
    counts = {name: sum(one.count(f"energon/{name}/") for one in text) for name in "de"}
    assert found["consumed"] == sum(counts.values()) == STEPS * 12
    assert found["trained"] == (STEPS - 2) * 12
    assert {name: one["consumed"] for name, one in found["datasets"].items()} == counts
    assert abs(found["largest"]["deviation"]) < 0.1
