import argparse
import gzip
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from plait import files
from plait.cli import chat as chat_command
from plait.cli import raw as raw_command
from plait.config.model import load
from plait.config.plan import Plan
from plait.data import chat, images, shards
from plait.errors import ConfigError, DataError, LayoutError
from plait.layout import Chat, Raw

GOOD = {"role": "user", "content": "Hello"}
BAD = {
    "bad_json": b"{",
    "unknown_part": b'{"role": "user", "content": [{"type": "audio"}]}',
    "not_base64": b'{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}]}',
    "undecodable_picture": b'{"role": "user", "content": [{"type": "image_url", '
    b'"image_url": {"url": "data:image/png;base64,QUJD"}}]}',
    "empty_text": b'{"role": "user", "content": ""}',
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(dataset: dict, *, name: str = "toy", shard: int = 0) -> Path:
    """Run both commands as the workflow does and give the path of the shard."""
    plan = Plan(load({"datasets": {name: dataset}}))
    raw, target = Raw(dataset=name), Chat(dataset=name, shard=shard)
    if not Path(str(raw)).exists():
        raw_command.run(arguments(plan, raw, target=str(raw)))
    chat_command.run(arguments(plan, target, source=str(raw), target=str(target)))
    return Path(str(target))


def arguments(plan: Plan, artifact, **paths: str) -> argparse.Namespace:
    return argparse.Namespace(settings=plan.settings_text(artifact), **paths)


def mine(path: Path, **more) -> dict:
    return {"source": {"kind": "chat-jsonl", "path": str(path)}, **more}


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def good(number: int = 0) -> bytes:
    return json.dumps({**GOOD, "content": f"Hello {number}"}).encode()


def ledger(shard: Path) -> dict:
    return files.read_json(str(shard).replace(".jsonl.gz", ".ledger.json"))


def rejects(shard: Path) -> list[dict]:
    path = Path(str(shard).replace(".jsonl.gz", ".rejects.jsonl"))
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# Built-in sources

EMOJI = {"kind": "emoji-captions", "languages": ["en", "ja", "zh"], "size": 64}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The raw emoji of the default plan."""
    from plait.data import builtin

    folder = tmp_path_factory.mktemp("emoji")
    facts = builtin.emoji_captions(EMOJI, folder)
    files.write_manifest(folder, kind="raw", settings=EMOJI, facts=facts)
    return folder, facts


def test_at_least_1400_emoji_are_drawn_each_once(emoji):
    folder, facts = emoji
    pictures = sorted((folder / "pictures").iterdir())
    assert len(pictures) == facts["pictures"] >= 1400
    assert len({path.read_bytes() for path in pictures}) == len(pictures)


def test_every_emoji_is_a_small_grey_picture_with_ink_inside_its_frame(emoji):
    for path in (emoji[0] / "pictures").iterdir():
        image = Image.open(path)
        assert (image.mode, image.size) == ("L", (64, 64))
        ink = image.point(lambda value: 255 - value).getbbox()
        assert ink is not None, path.name
        assert min(ink[0], ink[1]) > 0 and max(ink[2], ink[3]) < 64, path.name  # noqa: PT018


def test_every_emoji_has_words_in_every_language(emoji):
    rows = [json.loads(line) for line in (emoji[0] / "records.jsonl").read_bytes().splitlines()]
    assert Counter(row["language"] for row in rows) == dict.fromkeys(["en", "ja", "zh"], emoji[1]["pictures"])
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["caption"].strip(" :_") == row["caption"] != "" for row in rows)
    assert not any("_" in row["caption"] for row in rows)
    captions = {row["id"]: row["caption"] for row in rows}
    assert captions["emoji-1f34e-en"] == "red apple"
    assert captions["emoji-1f34e-ja"] == "赤リンゴ"


def test_captions_become_bare_assistant_turns_in_three_mixed_shards(emoji):
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/toy").symlink_to(emoji[0])
    dataset = {"source": EMOJI, "pictures": {"rule": "patches"}, "shards": 3}
    found = [list(shards.read(make(dataset, shard=shard))) for shard in range(3)]
    ids = [sample.id for shard in found for sample in shard]
    assert len(ids) == len(set(ids)) >= 3 * 1400
    assert max(map(len, found)) - min(map(len, found)) <= 1
    for shard in found:
        languages = Counter(sample.id.rsplit("-", 1)[1] for sample in shard)
        assert min(languages.values()) > 0.3 * len(shard)
        for sample in shard:
            (message,) = sample.messages
            assert message.role == "assistant"
            assert [type(part) for part in message.parts] == [chat.Picture, chat.Text]
            assert images.media_type(sample.pictures[0]) == "image/png"


def test_at_least_2000_dialogues_alternate_and_begin_with_the_user():
    shard = make({"source": {"kind": "chatterbot-dialogues"}})
    found = list(shards.read(shard))
    assert ledger(shard)["kept"] == len(found) >= 2000
    for sample in found:
        roles = [message.role for message in sample.messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert len(roles) >= 2
    languages = Counter(sample.id.split("-")[1] for sample in found)
    assert languages.keys() == {"english", "japanese", "chinese"}


def test_an_equal_source_gives_equal_bytes(tmp_path, monkeypatch):
    digests = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        shard = make({"source": {"kind": "chatterbot-dialogues", "languages": ["chinese"]}})
        made = [p for p in sorted((tmp_path / place).rglob("*")) if p.is_file()]
        digests.append([(p.relative_to(tmp_path / place), files.digest(p)) for p in made])
        assert ledger(shard)["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert digests[0] == digests[1]


# Your own jsonl


def test_another_process_gives_equal_bytes(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "mine/a.jsonl", [good(n) for n in range(9)])
    shard = make(mine(path))
    first = shard.read_bytes()

    monkeypatch.setattr(os, "getpid", lambda: 123456789)

    assert make(mine(path)).read_bytes() == first


def test_files_anywhere_are_linked_and_read_in_order(tmp_path):
    write_lines(tmp_path / "mine/b.jsonl", [good(2), good(3)])
    (tmp_path / "mine/a.jsonl.gz").write_bytes(gzip.compress(good(0) + b"\n\n" + good(1)))
    write_lines(tmp_path / "mine/notes.txt", [b"not chat"])
    shard = make(mine(tmp_path / "mine"))
    texts = [sample.messages[0].parts[0].text for sample in shards.read(shard)]
    assert texts == [f"Hello {number}" for number in range(4)]
    assert [sample.id for sample in shards.read(shard)] == ["toy-1", "toy-3", "toy-4", "toy-5"]
    assert (ledger(shard)["read"], ledger(shard)["blank"]) == (4, 1)
    linked = Path("data/raw/toy/b.jsonl")
    assert linked.is_symlink()
    manifest = files.check_manifest("data/raw/toy")
    assert manifest["files"]["b.jsonl"]["sha256"] == files.digest(tmp_path / "mine/b.jsonl")
    assert manifest["facts"]["other_files"] == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_shards_hold_every_line_once(tmp_path, number):
    path = write_lines(tmp_path / "x.jsonl", [good(n) for n in range(10)])
    found = []
    for shard in range(number):
        found += [s.id for s in shards.read(make(mine(path, shards=number), shard=shard))]
    assert sorted(found, key=lambda id_: int(id_[4:])) == [f"toy-{n}" for n in range(1, 11)]


def test_a_missing_path_is_refused_and_nothing_is_made(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        make(mine(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds none of the files that are read"):
        make(mine(tmp_path / "empty"))
    assert not list(Path("data").rglob("*.json*"))


def test_a_folder_that_plait_did_not_make_is_not_replaced(tmp_path):
    write_lines(Path("data/raw/toy/x.jsonl"), [good()])
    plan = Plan(load({"datasets": {"toy": mine(tmp_path)}}))
    with pytest.raises(LayoutError, match="plait did not make it"):
        raw_command.run(arguments(plan, Raw(dataset="toy"), target="data/raw/toy"))
    assert Path("data/raw/toy/x.jsonl").read_bytes() == good() + b"\n"


def test_datasets_packed_together_have_no_raw_source(tmp_path):
    datasets = {"a": mine(tmp_path), "both": {"pack_together": ["a"]}}
    plan = Plan(load({"datasets": datasets}))
    with pytest.raises(ConfigError, match="has no source itself"):
        raw_command.run(arguments(plan, Raw(dataset="both"), target="data/raw/both"))


def test_a_file_that_changed_after_it_was_linked_is_refused(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [good()])
    make(mine(path))
    line = path.read_bytes()
    for other in (line * 2, line[:-3].swapcase() + line[-3:]):  # longer; other letters, as many bytes
        path.write_bytes(other)
        with pytest.raises(DataError, match="that became a raw source"):
            make(mine(path))
    path.unlink()
    with pytest.raises(DataError, match="is gone"):
        make(mine(path))


def test_a_file_cut_short_is_named_and_leaves_no_shard(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(good(n) for n in range(1000)))[:-200])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz is cut short"):
        make(mine(path))
    assert not list(Path("data/processed/toy").iterdir())


# Rejects


def test_malformed_lines_are_rejected_by_line_and_reason_and_the_rest_is_kept(tmp_path):
    lines = [part for bad in BAD.values() for part in (good(), bad)]
    shard = make(mine(write_lines(tmp_path / "x.jsonl", lines), reject_limit=0.5))
    found = ledger(shard)
    assert (found["read"], found["kept"], found["rejected"]) == (10, 5, 5)
    assert found["reasons"] == dict.fromkeys(BAD, 1)
    assert [(r["file"], r["line"], r["reason"]) for r in rejects(shard)] == [
        ("x.jsonl", 2 * number + 2, reason) for number, reason in enumerate(BAD)
    ]
    assert all(reject["message"] for reject in rejects(shard))
    assert len(list(shards.read(shard))) == 5


def test_too_many_rejects_leave_the_rejects_file_alone(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [good(n) for n in range(8)])
    make(mine(path))
    files.remove(Path("data/raw/toy"))
    write_lines(path, [*(good(n) for n in range(8)), *BAD.values()])
    with pytest.raises(DataError, match=r"5 of 13 lines .* are rejected \(1 bad_json") as caught:
        make(mine(path, reject_limit=0.2))
    assert "The first: x.jsonl line 9: not JSON" in str(caught.value)
    assert [path.name for path in Path("data/processed/toy").iterdir()] == ["shard_00000.rejects.jsonl"]
    assert len(rejects(Path("data/processed/toy/shard_00000.jsonl.gz"))) == 5


@pytest.mark.parametrize(("rejected", "passes"), [(1, True), (2, False)])
def test_the_limit_itself_is_allowed(tmp_path, rejected, passes):
    path = write_lines(tmp_path / "x.jsonl", [good()] * (100 - rejected) + [b"{"] * rejected)
    if passes:
        assert ledger(make(mine(path)))["rejected"] == 1
    else:
        with pytest.raises(DataError, match=r"at most 1\.00% may be"):
            make(mine(path))


def test_a_shard_without_lines_is_refused(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [good()])
    with pytest.raises(DataError, match="no line of the raw source falls to"):
        make(mine(path, shards=2), shard=1)


def test_a_shard_beyond_the_last_is_refused(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [good(n) for n in range(10)])
    make(mine(path, shards=2))
    with pytest.raises(DataError, match="is beyond the last shard of toy, 00001"):
        shards.write(Path("data/raw/toy"), Chat(dataset="toy", shard=2), {"shards": 2})


def test_a_shard_is_made_from_its_own_raw_source(tmp_path):
    plan = Plan(load({"datasets": {"toy": mine(tmp_path)}}))
    target = Chat(dataset="toy", shard=0)
    with pytest.raises(LayoutError, match="is made from data/raw/toy, not from data/raw/other"):
        chat_command.run(arguments(plan, target, source="data/raw/other", target=str(target)))


def test_counts_that_do_not_balance_are_refused():
    shard, words = Chat(dataset="toy", shard=1), "shard_00001.jsonl.gz does not balance"
    shards.Counts(share=4, read=3, kept=1, blank=1, reasons=Counter(bad_json=1), left_out=Counter(a=1)).check(
        shard
    )
    with pytest.raises(
        DataError, match=f"{words}: 2 came in, 1 kept \\+ 0 rejected \\+ 0 left out = 1 went out"
    ):
        shards.Counts(share=3, read=2, kept=1, blank=1).check(shard)
    with pytest.raises(DataError, match=f"raw -> chat, .*{words}: 4 came in, 2 read \\+ 1 blank = 3"):
        shards.Counts(share=4, read=2, kept=2, blank=1).check(shard)


def test_a_shard_that_was_tampered_with_is_named(tmp_path):
    shard = make(mine(write_lines(tmp_path / "x.jsonl", [good()])))
    shard.write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(DataError, match=r"shard_00000\.jsonl\.gz line 1: expected one list"):
        list(shards.read(shard))
