"""From a step back to its raw lines: what trace lists is what the ranks consumed, text for tokens."""

import json
import shutil
import signal
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import FORM, STEPS, TARGET, analysed, pictured, project, wait_for
from makers import Maker
from transformers import AutoTokenizer

from plait import files, layout
from plait.cli.main import main
from plait.config.model import load
from plait.config.plan import Plan
from plait.errors import Stopped
from plait.report import curves
from plait.tokens import build
from plait.tokens.indexed import PackedShard
from plait.tokens.lineage import Lineage
from plait.tokens.roles import PACK_SEP
from plait.train.batches import Collator, Feed, Order

SHARDS = [f"data/megatron_format/f_d_pack64/shard_{n:05d}" for n in (0, 1)]
BAD = "".join(chr(33 + 89 * n % 90) for n in range(62))
"""A document of letters that no other has: it fills a pack, and its loss is high whenever it comes."""
AT = 37
COPIES = 2


def record(number):
    text = BAD if number == AT else f"{number} is {number}, and {number} it is"
    return {"id": f"r{number}", "messages": [{"role": "assistant", "content": text}]}


def raw_lines():
    """Two files, with lines that no record comes of: a blank one and a broken one."""
    first = [json.dumps(record(n)) for n in range(50)]
    second = [json.dumps(record(n)) for n in range(50, 140)]
    return {"a.jsonl": [*first[:3], "", *first[3:]], "sub/b.jsonl": ["{", *second]}


def stages(root):
    """The chat records of the raw files, in two shards, by the stages' commands."""
    for name, lines in raw_lines().items():
        (root / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "mine" / name).write_text("\n".join(lines) + "\n")
    source = {"kind": "chat-jsonl", "path": "mine"}
    plan = Plan(load({"datasets": {"d": {"source": source, "shards": 2, "reject_limit": 0.1}}}))
    raw, chats = layout.Raw(dataset="d"), [layout.Chat(dataset="d", shard=n) for n in (0, 1)]
    assert main(["raw", str(raw), "--settings", plan.settings_text(raw)]) == 0
    for one in chats:
        assert main(["chat", str(raw), str(one), "--settings", plan.settings_text(one)]) == 0
    return chats


def traceable(root, **keys):
    """A run over two packed shards that the stages made of the raw files."""
    place, grid = project(root, global_batch_size=2, hidden_dropout=0.0, **keys)
    maker = Maker(root / "made")
    (root / place.start).symlink_to(maker.shards(maker.hf(), grid.tp, grid.pp))
    with chdir(root):
        for chats, name in zip(stages(root), SHARDS, strict=True):
            folder = Path(name)
            folder.mkdir(parents=True)
            facts = build.build(folder, maker.plain, [Path(str(chats))], FORM, 64)
            files.write_manifest(folder, kind="indexed", settings={}, inputs=[Path(str(chats))], facts=facts)
        weights = [len(PackedShard(one)) for one in SHARDS]
        prefixes = zip(SHARDS, weights, strict=True)
        folder = analysed(place, {"sources": [{"prefix": one, "weight": w} for one, w in prefixes]})
        files.write_manifest(folder, kind="analysis", settings={}, inputs=map(Path, SHARDS), facts={})
        place.settings["seed"] = next(seed for seed in range(200) if step_of_bad(seed) in range(16, 22))
    return place


def order(seed):
    sizes = tuple(len(PackedShard(one)) for one in SHARDS)
    return Order(tuple(map(float, sizes)), sizes, seed, STEPS * 2)


def step_of_bad(seed):
    """The step that sees the bad document, if it is one; by the tokens of the packs alone."""
    shards, drawn = [PackedShard(one) for one in SHARDS], order(seed)
    texts = [shards[source].pack(pack).text for source, pack in (drawn[n] for n in range(STEPS * 2))]
    whole = AutoTokenizer.from_pretrained("made/plain")(BAD, add_special_tokens=False).input_ids
    steps = [n // 2 + 1 for n, text in enumerate(texts) if text.tolist() == whole]
    return steps[0] if len(steps) == 1 else 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two copies, trained in one piece; the place and what was said."""
    place = traceable(tmp_path_factory.mktemp("traced"), data_parallel_size=COPIES)
    return place, place.train(spike_threshold=0.5)


def traced(capsys, step, *more):
    assert main(["trace", "r", "--step", str(step), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def batches(seed, step, rank, copies):
    """What a rank's feed gives in a step."""
    collate = Collator(64, 0, (2,), (), 32, 1024, vision=False)
    feed = Feed([PackedShard(one) for one in SHARDS], order(seed), collate, 1, 2, rank, copies)
    return list(feed.batches(step - 1))


def text_of(document):
    """The text of a raw line, found by nothing but its file and number."""
    lines = Path(document["raw"]).read_text().splitlines()
    found = json.loads(lines[document["raw_line"] - 1])
    assert found["id"] == document["id"]
    return found["messages"][0]["content"]


def test_a_steps_raw_lines_are_the_tokens_that_its_ranks_consumed(trained, monkeypatch, capsys):
    place, _ = trained
    monkeypatch.chdir(place.root)
    tokenizer = AutoTokenizer.from_pretrained("made/plain")
    several = 0
    for step in range(1, STEPS + 1):
        found = traced(capsys, step)
        assert [one["sequence"] for one in found["sequences"]] == [0, 1]
        assert found["logged"]
        for one in found["sequences"]:
            (batch,) = batches(place.settings["seed"], step, one["sequence"], COPIES)
            role = PackedShard(one["shard"]).pack(one["pack"]).role
            consumed = batch.input_ids[0].numpy()[: len(role)][role != PACK_SEP]
            expected = [
                tokenizer(text_of(document), add_special_tokens=False).input_ids[
                    document["start"] : document["end"]
                ]
                for document in one["documents"]
            ]
            assert consumed.tolist() == [token for ids in expected for token in ids]
            assert [SHARDS[source] for source, _ in batch.samples] == [one["shard"]]
            assert [pack for _, pack in batch.samples] == [one["pack"]]
            several += len(expected) > 1
    assert several > STEPS


def test_without_its_log_a_step_is_computed_and_is_the_same(trained, monkeypatch, capsys, tmp_path):
    place, _ = trained
    monkeypatch.chdir(place.root)
    logged = [traced(capsys, step) for step in (1, 9, STEPS)]
    away = shutil.move("data/ckpts/r/samples", tmp_path / "samples")
    try:
        computed = [traced(capsys, step) for step in (1, 9, STEPS)]
    finally:
        shutil.move(away, "data/ckpts/r/samples")
    assert computed == [one | {"logged": False} for one in logged]


@pytest.fixture
def unlogged(trained, tmp_path, monkeypatch):
    """The same data and checkpoint, where the log of samples is gone and the run skips two steps."""
    whole, _ = trained
    place = whole.copy(tmp_path)
    for name in ("raw", "processed"):
        (tmp_path / "data" / name).symlink_to(whole.root / "data" / name)
    shutil.copytree(whole.root / TARGET, tmp_path / TARGET)
    told = files.read_json(whole.ckpts / "samples/job.json")
    told["settings"]["skip_train_iteration_range"] = ["3-4"]
    (place.ckpts / "samples").mkdir()
    files.write_json(place.ckpts / "samples/job.json", told)
    monkeypatch.chdir(tmp_path)
    return place


@pytest.mark.parametrize("kept", ["iter_0000012", ".state/iter_0000012", ".saved/iter_0000012"])
def test_whether_a_step_that_the_log_lacks_was_trained_is_said(kept, unlogged, capsys):
    (unlogged.ckpts / kept).parent.mkdir(exist_ok=True)
    (unlogged.root / TARGET).rename(unlogged.ckpts / kept)
    expected = {2: (False, True), 3: (True, False), 12: (False, True), 13: (False, False)}
    words = {
        (False, True): "the step was trained",
        (True, False): "skip_train_iteration_range leaves the step out, which trains nothing",
        (False, False): "the step is not trained yet",
    }
    for step, answers in expected.items():
        found = traced(capsys, step)
        assert (found["skipped"], found["trained"], found["logged"]) == (*answers, False)
        assert main(["trace", "r", "--step", str(step)]) == 0
        first, *_ = capsys.readouterr().out.splitlines()
        assert first.endswith(f"computed from seed and step, not in the run's log; {words[answers]}")


def test_a_log_that_ends_later_says_that_a_step_was_trained(unlogged, capsys):
    shutil.rmtree(unlogged.root / TARGET)
    assert not traced(capsys, 7)["trained"]
    (unlogged.ckpts / "samples/dp_000.jsonl").write_text('{"iteration": 7, "sam')
    assert not traced(capsys, 7)["trained"]
    (unlogged.ckpts / "samples/dp_000.jsonl").write_text('{"iteration": 8, "samples": []}\n')
    assert traced(capsys, 7)["trained"]


def test_a_checkpoint_of_other_data_says_nothing_of_a_step(unlogged, capsys):
    path = unlogged.root / TARGET / "plait.json"
    manifest = files.read_json(path)
    manifest["inputs"]["data/analysis/x"] = "0" * 64
    files.write_json(path, manifest)
    assert not traced(capsys, 7)["trained"]


def test_a_spike_is_told_at_its_step_with_its_document(trained, monkeypatch, capsys, tmp_path):
    place, said = trained
    monkeypatch.chdir(place.root)
    step = step_of_bad(place.settings["seed"])
    line = f"data/raw/d/a.jsonl:{AT + 2}"  # from 1, and there is a blank line before it
    rows = {row["iteration"]: row["loss spike"] for row in place.rows() if "loss spike" in row}
    (event,) = map(json.loads, Path("data/ckpts/r/events.jsonl").read_text().splitlines())

    assert list(rows) == [step]
    assert event["iteration"] == step
    assert event["jump"] == rows[step] > 0.5
    assert [line] in event["lines"]
    assert [json.loads(one) for one in said.splitlines() if one.startswith("{")] == [event]
    assert event["see"] == f"plait trace r --step {step}"
    found = traced(capsys, step)
    ids = [document["id"] for one in found["sequences"] for document in one["documents"]]
    assert f"r{AT}" in ids
    assert len(event["lines"]) == len(event["samples"]) == len(found["sequences"])
    assert curves.read(Path("data/ckpts/r/metrics.jsonl")).spikes == [step]
    curve = curves.read(Path("data/ckpts/r/metrics.jsonl"))
    curves.draw(curve, tmp_path / "loss.png", form="png", name="r")
    unmarked = replace(curve, spike=np.full(STEPS, np.nan))
    curves.draw(unmarked, tmp_path / "unmarked.png", form="png", name="r")
    assert (tmp_path / "loss.png").read_bytes() != (tmp_path / "unmarked.png").read_bytes()
    assert curves.sentence(curve) == f"{curves.sentence(unmarked)}; 1 spike, the last at {step}"
    losses = [row["lm loss"] for row in place.rows()]
    reference = float(np.median(losses[step - 11 : step - 1]))
    assert event["reference"] == reference
    assert event["jump"] == losses[step - 1] / reference - 1


def test_words_for_a_reader(trained, monkeypatch, capsys):
    place, _ = trained
    monkeypatch.chdir(place.root)
    step = step_of_bad(place.settings["seed"])
    assert main(["trace", "r", "--step", str(step)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"step {step} of r: 2 sequences, in the run's log\n0: {SHARDS[0][:30]}")
    assert f"   data/raw/d/a.jsonl line {AT + 2}, data/processed/d/shard_0000" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["r", "--step", "0"], "has no step 0: it has 1 to 24"),
        (["r", "--step", "25"], "has no step 25: it has 1 to 24"),
        (["other", "--step", "1"], "there is no data/ckpts/other"),
    ],
)
def test_what_is_not_there_is_said(words, sentence, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0].root)
    assert main(["trace", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("error: ")
    assert "Traceback" not in said


@pytest.mark.parametrize("gone", [SHARDS[0], "data/analysis/x"])
def test_data_that_are_gone_or_others_now_are_said(gone, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0].root)
    steps = next(n for n in range(1, STEPS) if "analysis" in gone or gone in str(traced(capsys, n)))
    away = Path("away")
    Path(gone).rename(away)
    try:
        assert main(["trace", "r", "--step", str(steps)]) == 2
        assert f"{gone} is gone" in capsys.readouterr().err
        shutil.copytree(away, gone)
        manifest = files.read_json(Path(gone) / "plait.json")
        files.write_json(Path(gone) / "plait.json", manifest | {"settings": {"other": 1}})
        assert main(["trace", "r", "--step", str(steps)]) == 2
        assert f"was made from {gone} of digest" in capsys.readouterr().err
    finally:
        shutil.rmtree(gone, ignore_errors=True)
        away.rename(gone)


def logs(place):
    """What the run's logs say, by file."""
    paths = [*sorted((place.ckpts / "samples").glob("dp_*")), place.ckpts / "events.jsonl"]
    return {path.name: path.read_text() for path in paths}


def test_megatron_core_still_opens_the_shards(trained, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    monkeypatch.chdir(trained[0].root)
    for shard in SHARDS:
        text = IndexedDataset(f"{shard}/data-text", multimodal=False)
        found = IndexedDataset(f"{shard}/data-lineage", multimodal=False)
        assert len(text) == len(found) == len(Lineage(shard))
        assert "data-lineage.bin" in files.check_manifest(shard)["files"]


@pytest.mark.long
@pytest.mark.parametrize("copies", [1, 2])
def test_a_run_that_was_stopped_tells_what_one_that_was_not_does(copies, trained, tmp_path):
    whole, _ = trained
    place = whole.copy(tmp_path)
    for name in ("raw", "processed"):
        (tmp_path / "data" / name).symlink_to(whole.root / "data" / name)
    place.settings = whole.settings | {"data_parallel_size": copies}
    process = place.begin(spike_threshold=0.5)
    wait_for(lambda: len(place.rows()) >= 12, process)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=120)
    assert process.returncode == Stopped.status
    place.train(spike_threshold=0.5)

    told, expected = logs(place), logs(whole)
    assert [json.loads(one)["iteration"] for one in told["dp_000.jsonl"].splitlines()] == [
        *range(1, STEPS + 1)
    ]
    if copies == COPIES:
        assert told == expected
    else:
        assert told.keys() == {"dp_000.jsonl", "events.jsonl"}
        events = [json.loads(one["events.jsonl"]) for one in (told, expected)]
        assert events[0]["samples"] == events[1]["samples"]
        assert events[0]["iteration"] == events[1]["iteration"]


@pytest.mark.long
def test_samples_of_energon_are_traced_by_their_keys(tmp_path, monkeypatch, capsys):
    place = pictured(tmp_path, data_parallel_size=2, num_workers=1, skip_train_iteration_range=["5-6"])
    place.train()
    monkeypatch.chdir(tmp_path)
    seen = []
    for step in range(1, STEPS + 1):
        found = traced(capsys, step)
        assert found["skipped"] == (step in (5, 6)) != found["trained"]
        assert [one["sequence"] for one in found["sequences"]] == [*range(12)]
        for one in found["sequences"]:
            (document,) = one["documents"]
            assert document["id"] == one["key"]
            assert Path(one["tar"]).is_file()
            seen.append(one["key"])
    train = sum(files.read_json("data/energon/d/.nv-meta/.info.json")["shard_counts"].values())
    assert len(set(seen)) > 0.7 * train
    (place.ckpts / "samples/dp_000.jsonl").unlink()
    assert main(["trace", "r", "--step", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sequences"]) == 6
