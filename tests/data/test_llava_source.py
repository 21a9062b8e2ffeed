"""LLaVA json, tars and prepared folders as raw sources: read one by one, linked, changed files found."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace
from talks import KEYS, exchange, picture, talk, tar_of

from plait import files
from plait.data import llava, members, shards, sources, webdataset
from plait.data.chat import Picture, Text
from plait.errors import DataError
from plait.layout import Chat

CHATS = {
    "shards": 1,
    "pictures": {"rule": "keep", "patch_size": 32, "max_side": 1024},
    "reject_limit": 1.0,
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(source):
    """A raw source as the stage makes it."""
    folder = Path("data/raw/toy")
    with files.appears_whole(folder, folder=True) as part:
        facts = sources.make(source, part)
        files.write_manifest(part, kind="raw", settings={}, facts=facts)
    return folder, facts


def chats(source):
    """The conversations of a source and why others are rejected."""
    folder, _ = made(source)
    ledger = shards.write(folder, Chat(dataset="toy", shard=0), {"source": source, **CHATS})
    return list(shards.read("data/processed/toy/shard_00000.jsonl.gz")), ledger["reasons"]


def record(number, **more):
    turns = [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": f"It is {number}."},
    ]
    return {"id": f"r{number}", "image": f"train/{number}.jpg", "conversations": turns, **more}


def llava_json(records, pictures=3):
    """A json beside a folder of pictures; how the config names them."""
    Path("mine/images/train").mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        Path(f"mine/images/train/{number}.jpg").write_bytes(picture(number).encoded)
    text = records if isinstance(records, str) else json.dumps(records, indent=1)
    Path("mine/list.json").write_text(text)
    return {"kind": "llava-json", "path": "mine/list.json", "images": "mine/images"}


def test_text_stands_verbatim_around_the_pictures_of_a_llava_json():
    several = record(1, image=["train/1.jpg", "train/2.jpg"])
    several["conversations"][0]["value"] = "<image>\n<image>\nWhich?"
    silent = record(2, image=None)
    silent["conversations"][0]["value"] = "Hello"
    found, reasons = chats(llava_json([record(0), several, silent]))
    assert reasons == {}
    assert [sample.id for sample in found] == ["r0", "r1", "r2"]
    assert [sample.messages[0].parts for sample in found] == [
        (Text("What is this?\n"), picture(0)),
        (picture(1), Text("\n"), picture(2), Text("\nWhich?")),
        (Text("Hello"),),
    ]


WRONG = {
    "missing_picture": [
        record(0, image="train/9.jpg"),
        record(0, image="../list.json"),
        record(0, image="/etc/passwd"),
        record(0, image=7),
        record(0, image="train"),
    ],
    "wrong_pictures": [record(0, image=[]), record(0, image=["train/0.jpg", "train/1.jpg"])],
    "not_a_record": [7, "x", [], {"id": "a"}, record(0, conversations="x"), record(0, conversations=["x"])],
    "no_messages": [record(0, conversations=[])],
    "empty_text": [
        record(0, conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}])
    ],
}


def test_each_wrong_record_is_rejected_with_its_reason():
    found, reasons = chats(llava_json([record(1), *(one for group in WRONG.values() for one in group)]))
    assert reasons == {reason: len(group) for reason, group in sorted(WRONG.items())}
    assert [sample.id for sample in found] == ["r1"]


def test_ids_that_a_list_gives_twice_become_ids_of_their_own():
    again = [record(0), record(0), record(1), record(0, id="r0-2"), record(0)]
    found, _ = chats(llava_json(again))
    assert [sample.id for sample in found] == ["r0", "r0-2", "r1", "r0-2-2", "r0-3"]
    assert files.read_manifest("data/raw/toy")["facts"] == {"records": 5, "renamed": 3}


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_list_is_read_in_pieces(chunk, monkeypatch):
    monkeypatch.setattr(members, "CHUNK", chunk)
    values = [{"a": "]},{é\\"}, 12, -3.5e7, True, None, "日本", [[], {}]]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False), "\ufeff [ ] \n"):
        Path("l.json").write_text(text, encoding="utf-8")
        assert list(llava.records(Path("l.json"))) == (values if "a" in text else [])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no list of records"),
        ('{"a": 1}', "is no list of records"),
        ("[", "cannot be read after record 0"),
        ('[{"a": 1}', "neither comma nor end after record 1"),
        ('[{"a": 1}, {"a"', "cannot be read after record 1"),
        ("[1, 2,]", "cannot be read after record 2"),
        ("[1 2]", "neither comma nor end after record 1"),
        ("[1]]", "goes on after its list of 1 records"),
        ("[] 1", "goes on after its list of 0 records"),
        ("[1] [2]", "goes on after its list of 1 records"),
    ],
)
def test_what_is_no_list_has_a_sentence(text, sentence):
    with pytest.raises(DataError, match=sentence):
        made(llava_json(text))
    assert not Path("data/raw/toy").exists()


def test_a_mistake_far_from_the_end_does_not_load_the_file(monkeypatch):
    monkeypatch.setattr(members, "CHUNK", 64)
    monkeypatch.setattr(members, "LONGEST", 128)
    Path("l.json").write_text("[1, oops, " + "2, " * 5000 + "3]")
    with Path("l.json").open() as file:
        reader = members._Reader(Path("l.json"), file, "")
        with pytest.raises(json.JSONDecodeError):
            list(reader.listed() if reader.mark() == "[" else ())
        assert file.tell() < 1000


def test_a_changed_picture_is_found():
    source = llava_json([record(0), record(1)])
    made(source)
    Path("mine/images/train/1.jpg").write_bytes(picture(200).encoded)
    lines = [line.content for line in sources.read("data/raw/toy")]
    assert llava.read(lines[0], Path("data/raw/toy")).id == "r0"
    with pytest.raises(DataError, match=r"1.jpg is not the file that became a raw source"):
        llava.read(lines[1], Path("data/raw/toy"))


def test_pictures_are_linked_not_copied():
    folder, _ = made(llava_json([record(0)]))
    assert (folder / llava.PICTURES).is_symlink()
    assert list(files.read_manifest(folder)["files"]) == ["records.jsonl"]


# Tars


def tars(samples=(), layout="conversations"):
    (Path("mine") / "wds").mkdir(parents=True)
    webdataset.write(samples, Path("mine"), {**KEYS, "shard_name": "wds/{}.tar", "layout": layout})
    return {"kind": "tars", "path": "mine"}


@pytest.mark.parametrize(
    ("layout", "make"), [("conversations", talk), ("conversations", exchange), ("question_answer", exchange)]
)
def test_tars_of_both_layouts_become_chat_records(layout, make):
    samples = [make(number) for number in range(9)]
    found, reasons = chats(tars(samples, layout))
    assert [replace(one, source=None) for one in found] == samples
    assert len({one.source for one in found if one.source}) == len(samples)
    assert reasons == {}
    linked = [path for path in Path("data/raw/toy/wds").iterdir() if path.is_symlink()]
    assert len(linked) == 3


def test_keys_that_shards_give_anew_become_ids_of_their_own():
    for name in "ab":
        parts = webdataset.to_parts(exchange(ord(name)), "conversations")
        tar_of(Path(f"mine/{name}.tar"), [("0", parts)])
    found, _ = chats({"kind": "tars", "path": "mine"})
    assert [sample.id for sample in found] == ["0", "0-2"]
    assert [sample.messages[1].parts for sample in found] == [(Text("it is 97"),), (Text("it is 98"),)]


def test_samples_of_a_tar_that_are_none_are_rejected():
    whole = webdataset.to_parts(exchange(0), "question_answer")
    broken = [
        {**whole, "txt": b"\xff"},
        {**whole, "json": b"{"},
        {"jpg": whole["jpg"]},
        {**whole, "jpg": b"\xff\xd8\xff no"},
        {**whole, "txt": b" "},
        {**whole, "json": b'{"question": 1}'},
        {"image.jpg": whole["jpg"], "txt": whole["txt"], "json": whole["json"]},
        {"txt": whole["txt"], "json": whole["json"]},
    ]
    tar_of(Path("mine/a.tar"), [(f"{number}", parts) for number, parts in enumerate([whole, *broken])])
    found, reasons = chats({"kind": "tars", "path": "mine"})
    assert len(found) == 1
    assert reasons == {
        "bad_json": 1, "empty_text": 1, "missing_picture": 1, "not_a_record": 1, "not_text": 2,
        "undecodable_picture": 1, "unknown_part": 1,
    }  # fmt: skip


def test_a_changed_tar_is_found():
    made(tars([exchange(0)]))
    path = Path("mine/wds/0.tar")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"what is 0", b"what is 9"))
    with pytest.raises(DataError, match=r"0.tar is not the file of \d+ bytes"):
        next(sources.read("data/raw/toy"))


def test_a_damaged_tar_makes_no_source():
    source = tars([exchange(0)])
    path = Path("mine/wds/0.tar")
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(DataError, match=r"0.tar is (cut short|damaged)"):
        made(source)


# Others


def test_a_folder_that_energon_has_not_prepared():
    source = tars([exchange(0)]) | {"kind": "energon"}
    with pytest.raises(DataError, match=r"mine has no .nv-meta/dataset.yaml"):
        made(source)


def test_what_was_never_released_is_asked_for_by_name():
    with pytest.raises(
        DataError, match="the data of data/raw/toy must be supplied by you: the records of stage 2"
    ):
        made({"kind": "you-supply", "what": "the records of stage 2"})


def test_a_caption_of_the_builtin_pictures_stays_solos_in_chat_records():
    """Only the writer of tars makes a question of its picture."""
    Path("cat.png").write_bytes(picture(0, "PNG").encoded)
    row = {"id": "cat", "picture": "cat.png", "caption": "cat face", "language": "en"}
    sample = sources.read_captioned(json.dumps(row).encode(), Path())
    assert [message.role for message in sample.messages] == ["assistant"]
    asked = webdataset.with_question(sample)
    assert [message.role for message in asked.messages] == ["user", "assistant"]
    assert isinstance(asked.messages[0].parts[0], Picture)
    assert asked.messages[1].parts == sample.messages[0].parts[1:]
