"""Records of released datasets, built as they were released: each shape gives what is written here."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import lz4.frame
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import igzip
from pyarrow import parquet
from talks import picture

from plait import files
from plait.config.model import load
from plait.config.plan import Plan
from plait.data import albums, chat, members, said, shaped, shapes, shards, sources
from plait.data.chat import Text
from plait.errors import ConfigError, DataError, RecordError
from plait.layout import Chat, Raw, said_of


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "SAMPLES", 1)


def planned(source, count=1):
    config = load({"datasets": {"toy": {"source": source, "shards": count, "reject_limit": 1.0}}})
    return Plan(config)


def made(source):
    """A raw source as the stage makes it."""
    chosen = planned(source).settings(Raw(dataset="toy"))
    folder = Path("data/raw/toy")
    with files.appears_whole(folder, folder=True) as part:
        facts = sources.make(chosen["source"], part)
        files.write_manifest(
            part, kind="raw", settings={}, facts=facts, unlisted=sources.unlisted(chosen["source"])
        )
    return folder, facts


def ledger(source, count=1):
    """All shards of a source: its conversations, why others are rejected, and what is left out."""
    folder, facts = made(source)
    kept, rejected, left, read = [], Counter(), Counter(), 0
    for number in range(count):
        shard = Chat(dataset="toy", shard=number)
        found = shards.write(folder, shard, planned(source, count).settings(shard))
        assert found["read"] == found["kept"] + found["rejected"] + sum(found["left_out"].values())
        own = list(shards.read(str(shard)))
        if own:
            told = np.frombuffer(Path(said_of(str(shard))).read_bytes(), said.ROW)
            assert (told["digest"] == said.rows(own)["digest"]).all()
        kept += own
        rejected.update(found["reasons"])
        left.update(found["left_out"])
        read += found["read"] + found["blank"]
    assert read == facts["records"]
    return kept, dict(rejected), dict(left)


def turns(sample):
    """A conversation as words and bytes of pictures."""
    return [
        (m.role, *(p.text if isinstance(p, Text) else p.encoded for p in m.parts)) for m in sample.messages
    ]


def chats(source, **reasons):
    found, rejected, left = ledger(source)
    assert {**rejected, **left} == reasons
    return [turns(sample) for sample in found]


def jsonl(path, rows):
    text = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    packed = {
        ".gz": lambda: igzip.compress(text),
        ".lz4": lambda: lz4.frame.compress(text),
        ".zst": lambda: zstandard.ZstdCompressor().compress(text),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(packed.get(Path(path).suffix, lambda: text)())


def table(path, rows, group=2):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def tarred(path, members):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def zipped(path, members):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)


def folder_of(path, members):
    for name, content in members.items():
        (Path(path) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(path) / name).write_bytes(content)


JPEG = [picture(n).encoded for n in range(6)]
PNG = [picture(n, "PNG").encoded for n in range(6)]


def files_of(shape, path="mine", **more):
    return {"kind": "files", "path": path, "shape": shape, **more}


# Text


def test_slimpajama_is_documents_without_those_of_some_corpora():
    sets = ["RedPajamaGithub", "RedPajamaCommonCrawl", "RedPajamaC4", "RedPajamaBook"]
    rows = [{"text": f"text {n}", "meta": {"redpajama_set_name": one}} for n, one in enumerate(sets)]
    jsonl("mine/train/chunk1/example_train_0.jsonl.zst", [*rows, {"text": "no meta"}, b"{broken"])
    assert chats(
        files_of("slimpajama"), RedPajamaCommonCrawl=1, RedPajamaC4=1, missing_field=1, bad_json=1
    ) == [[("assistant", "text 0")], [("assistant", "text 3")]]
    assert len(chats(files_of({"name": "slimpajama", "leave_out": []}), missing_field=1, bad_json=1)) == 4


@pytest.mark.parametrize(
    "name", ["c4-train.00000.json.gz", "a.jsonl", "a.jsonl.lz4", "a.jsonl.zst", "a.parquet"]
)
def test_c4_is_documents_however_they_are_packed(name):
    rows = [{"text": f"text {n}", "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"} for n in range(5)]
    (table if name.endswith("parquet") else jsonl)(f"mine/{name}", rows)
    assert chats(files_of("c4")) == [[("assistant", f"text {n}")] for n in range(5)]


def test_texts_that_say_nothing_are_rejected():
    jsonl(
        "mine/a.jsonl",
        [{"text": " \n"}, {"text": ""}, {"text": 3}, {"words": "x"}, ["text"], b"", {"text": "x"}],
    )
    assert chats(files_of("text"), empty_text=2, not_text=1, missing_field=1, not_a_record=1) == [
        [("assistant", "x")]
    ]


# Conversations


def talk(*pairs):
    return {"id": "x_0", "conversations": [{"from": one, "value": words} for one, words in pairs]}


def test_sharegpt_is_cleaned_as_code_act_cleans_it():
    hello = (("human", "a\\_b"), ("gpt", "yes"))
    searched = (("user", "find"), ("chatgpt", "so"), ("bing", "rain"), ("bard", "wet"))
    noticed = (("human", "This chat conversation is shared from x"), *hello)
    wrong = [
        talk(("gpt", "first"), *hello), talk(*hello, ("gpt", "again")), talk(("human", "alone")),
        talk(("human", "q"), ("gpt", "Cancelled")), talk(("alien", "q"), ("gpt", "a")), {"id": "x"},
    ]  # fmt: skip
    Path("mine").mkdir()
    rows = [talk(*hello), talk(*searched), talk(*noticed), talk(("system", "be"), *hello), *wrong]
    Path("mine/sg.json").write_text(json.dumps(rows))
    left = {"assistant_first": 1, "one_speaks_twice": 1, "one_sided": 1, "cancelled": 1}
    spoken = [("user", "a_b"), ("assistant", "yes")]
    assert chats(files_of("sharegpt"), unknown_role=1, missing_field=1, **left) == [
        spoken,
        [("user", "find"), ("assistant", "so"), ("user", "Bing Search Result:\nrain"), ("assistant", "wet")],
        spoken,
        [("system", "be"), *spoken],
    ]
    four = files_of({"name": "sharegpt", "min_turns": 4})
    assert len(chats(four, unknown_role=1, missing_field=1, too_few_turns=3, **left)) == 1


def test_openorca_is_a_system_a_question_and_a_response():
    row = {"id": "cot.1", "system_prompt": "Be brief.", "question": "q", "response": "r"}
    table("mine/1M-GPT4-Augmented.parquet", [row, {**row, "id": "flan.2"}, {**row, "system_prompt": ""}])
    assert chats(files_of({"name": "openorca", "ids": "cot."}), other_id=1) == [
        [("system", "Be brief."), ("user", "q"), ("assistant", "r")],
        [("user", "q"), ("assistant", "r")],
    ]


def test_capybara_is_inputs_and_outputs():
    rows = [
        {
            "source": "Airoboros",
            "conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}],
        },
        {"source": "x", "conversation": []},
        {"source": "x", "conversation": [{"input": "a"}]},
        {"source": "x", "conversation": [{"input": "a", "output": ""}]},
    ]
    jsonl("mine/CapybaraPure_Decontaminated.jsonl", rows)
    assert chats(files_of("capybara"), no_messages=1, missing_field=1, empty_text=1) == [
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]


@pytest.mark.parametrize("name", ["codeact.jsonl", "codeact.parquet"])
def test_code_act_is_chat_records(name):
    said = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    rows = [{"id": "c1", "conversations": said}]
    (table if name.endswith("parquet") else jsonl)(f"mine/{name}", rows)
    assert chats(files_of("codeact")) == [[("system", "s"), ("user", "u"), ("assistant", "a")]]


def test_columns_beside_a_conversation_may_be_anything_and_its_own_may_not():
    said = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    table("mine/a.parquet", [{"conversations": said, "when": datetime.now(UTC), "blob": b"\xff"}])
    table("mine/b.parquet", [{"conversations": [{"role": "user", "content": b"u"}]}])
    deep = f'{{"conversations": {json.dumps(said)}, "n": {"[" * 400}{"]" * 400}}}'
    jsonl("mine/c.jsonl", [deep.encode()])
    assert chats(files_of("chat"), not_text=1, not_a_record=1) == [[("user", "u"), ("assistant", "a")]]


# Pictures that records name


def asks(number, **more):
    return {"image": f"bar_{number}.png", "question": f"How many {number}?", "answer": str(number), **more}


PUT = {
    "folder": lambda names: folder_of("pics/images", names),
    "zip": lambda names: zipped("pics/images.zip", {f"images/{name}": one for name, one in names.items()}),
    "tar": lambda names: tarred("pics/images.tar", {f"./images/{name}": one for name, one in names.items()}),
}


@pytest.mark.parametrize("where", PUT)
@pytest.mark.parametrize("name", ["train_qa.json", "train_qa.jsonl.gz"])
def test_dvqa_is_a_question_about_a_chart_in_a_folder_a_zip_or_a_tar(where, name):
    PUT[where]({f"bar_{n}.png": PNG[n] for n in range(2)})
    rows = [asks(0), asks(1), asks(9), asks(0, answer=3), asks(0, image="../mine/x"), asks(0, image=None)]
    Path("mine").mkdir()
    (jsonl if "jsonl" in name else lambda path, rows: Path(path).write_text(json.dumps(rows)))(
        f"mine/{name}", rows
    )
    path = {"folder": "pics/images", "zip": "pics/images.zip", "tar": "pics"}[where]
    assert chats(
        files_of("dvqa", pictures=path),
        missing_picture=3,
        not_text=1,
    ) == [
        [("user", PNG[0], "\nHow many 0?"), ("assistant", "0")],
        [("user", PNG[1], "\nHow many 1?"), ("assistant", "1")],
    ]


def test_figureqa_says_yes_or_no():
    pairs = [
        {"question_string": "Is Red the minimum?", "question_id": 0, "image_index": 0, "answer": 1},
        {"question_string": "Is Red the maximum?", "question_id": 1, "image_index": 1, "answer": 0},
        {"question_string": "Is Red rough?", "question_id": 2, "image_index": 1, "answer": 2},
        {"question_string": "Is Red smooth?", "question_id": 3, "image_index": 7, "answer": 1},
    ]
    folder_of("mine/train1", {f"png/{n}.png": PNG[n] for n in range(2)})
    Path("mine/train1/qa_pairs.json").write_text(json.dumps({"total": {"n": [4]}, "qa_pairs": pairs, "z": 1}))
    source = files_of("figureqa", "mine/train1/qa_pairs.json")
    assert chats(source, not_text=1, missing_picture=1) == [
        [("user", PNG[0], "\nIs Red the minimum?"), ("assistant", "Yes")],
        [("user", PNG[1], "\nIs Red the maximum?"), ("assistant", "No")],
    ]


def cover(split=1, **more):
    return {
        "imageURL": "http://ecx.images-amazon.com/images/I/51L.jpg",
        "questions": ["Who wrote it?", "What genre?"],
        "answers": ["Ann", "Art"], "title": "T", "authorName": "Ann", "genre": "Art", "split": split, **more,
    }  # fmt: skip


def test_ocr_vqa_is_all_questions_about_a_cover():
    folder_of("mine/images", {"1588.jpg": JPEG[0], "77.gif": JPEG[1], "7.jpg": JPEG[2]})
    books = {
        "1588": cover(), "77": cover(imageURL="http://x/y.gif?z=1"), "5": cover(split=3), "6": cover(imageURL="http://[x"),
        "7": cover(answers=["Ann"]), "8": "no book",
    }  # fmt: skip
    Path("mine/dataset.json").write_text(json.dumps(books))
    source = files_of("ocr-vqa", "mine/dataset.json", pictures="mine/images")
    said = [("assistant", "Ann"), ("user", "What genre?"), ("assistant", "Art")]
    found = chats(source, split_3=1, missing_picture=1, wrong_answers=1, not_a_record=1)
    assert found == [[("user", one, "\nWho wrote it?"), *said] for one in JPEG[:2]]


def test_llavar_and_allava_stand_as_llava_does_in_zips_with_other_folders():
    human = {"from": "human", "value": "What is it?\n<image>"}
    rows = [
        {
            "id": n,
            "image": f"allava_laion/images/{n}.jpeg",
            "conversations": [human, {"from": "gpt", "value": "x"}],
        }
        for n in range(4)
    ]
    Path("mine").mkdir()
    Path("mine/ALLaVA-Caption-LAION-4V.json").write_text(json.dumps(rows))
    zipped("mine/image_chunks/images_0.zip", {"images/0.jpeg": JPEG[0], "x/1.jpeg": JPEG[1]})
    zipped("mine/image_chunks/images_1.zip", {"2.jpeg": JPEG[2]})
    source = files_of("allava", pictures="mine/image_chunks")
    assert chats(source, missing_picture=1) == [
        [("user", "What is it?\n", one), ("assistant", "x")] for one in JPEG[:3]
    ]


MMC4 = {
    "text_list": ["one", "two", "three"],
    "image_info": [
        {"image_name": "b.jpg", "raw_url": "http://x/b.jpg", "matched_text_index": 2},
        {"image_name": "a.jpg", "raw_url": "http://x/a", "matched_text_index": 0},
        {"image_name": "c.jpg", "raw_url": "http://x/c.jpg", "matched_text_index": 2},
    ],
    "similarity_matrix": [], "url": "http://x", "could_have_url_duplicate": 0,
}  # fmt: skip


def test_mmc4_has_each_picture_before_the_text_that_it_matches():
    lost = {**MMC4, "image_info": [{"image_name": "z.jpg", "raw_url": "http://z", "matched_text_index": 1}]}
    wrong = {
        **MMC4,
        "image_info": [{"image_name": "a.jpg", "raw_url": "http://x/a", "matched_text_index": 3}],
    }
    none = {**MMC4, "image_info": None}
    jsonl("mine/docs_no_face_shard_0_v3.jsonl", [MMC4, lost, wrong, none, {"text_list": ["x"]}])
    folder_of("pics", {"a.jpg": JPEG[0], "b.jpg": JPEG[1], "c.jpg": JPEG[2]})
    whole = [("assistant", JPEG[0], "one", "two", JPEG[1], JPEG[2], "three")]
    wanted = {"wrong_pictures": 1, "missing_field": 1, "not_a_record": 1}
    assert chats(files_of("mmc4", pictures="pics"), **wanted) == [
        whole,
        [("assistant", "one", "two", "three")],
    ]
    strict = files_of({"name": "mmc4", "missing": "reject"}, pictures="pics")
    assert chats(strict, missing_picture=1, **wanted) == [whole]


def test_mmc4_finds_what_img2dataset_fetched_by_its_address():
    jsonl("mine/docs.jsonl", [MMC4])
    tarred("pics/00000.tar", {"000000000.jpg": JPEG[0], "000000000.json": b"{}"})
    tarred("pics/00001.tar", {"000010007.jpg": JPEG[1]})
    rows = [("http://x/a", "000000000"), ("http://x/b.jpg", "000010007"), ("http://x/c.jpg", "000010008")]
    table("pics/selected.parquet", [{"url": url, "key": key, "img2dataset_shard_id": 0} for url, key in rows])
    assert chats(files_of("mmc4", pictures="pics")) == [
        [("assistant", JPEG[0], "one", "two", JPEG[1], "three")]
    ]


# Pictures in the records themselves


def embedded(encoded):
    return {"bytes": encoded, "path": None}


def test_websight_is_a_screenshot_and_its_html():
    rows = [
        {"image": embedded(PNG[n]), "text": f"<html>{n}</html>", "llm_generated_idea": ""} for n in range(3)
    ]
    table("mine/v0.2/train-00000.parquet", [*rows, {"image": None, "text": "x", "llm_generated_idea": ""}])
    found = chats(files_of("websight"), missing_picture=1)
    assert found == [[("user", PNG[n]), ("assistant", f"<html>{n}</html>")] for n in range(3)]


def test_the_cauldron_is_exchanges_about_pictures():
    texts = [
        {"user": "q", "assistant": "a", "source": "DVQA"},
        {"user": "r", "assistant": "b", "source": "DVQA"},
    ]
    table("mine/dvqa/train-0.parquet", [{"images": [embedded(PNG[0]), embedded(PNG[1])], "texts": texts}])
    assert chats(files_of("cauldron")) == [
        [("user", PNG[0], PNG[1], "\nq"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    ]


def test_ocr_vqa_of_the_hub_has_its_pictures_in_parquet():
    row = {"image": embedded(JPEG[0]), "image_id": "1", "questions": ["q", "r"], "answers": ["a", "b"]}
    table("mine/train-0.parquet", [row])
    assert chats(files_of("ocr-vqa")) == [
        [("user", JPEG[0], "\nq"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    ]


def test_columns_of_any_names_are_questions_and_answers():
    table("mine/a.parquet", [{"pic": embedded(PNG[0]), "ask": "q", "says": ["a", "b"]}])
    shape = {"name": "question-answer", "image": "pic", "question": "ask", "answer": "says"}
    assert chats(files_of(shape)) == [[("user", PNG[0], "\nq"), ("assistant", "a")]]


def test_pictures_that_datasets_has_only_the_paths_of_are_found_in_a_folder():
    table("mine/a.parquet", [{"image": {"bytes": None, "path": "x/a.png"}, "question": "q", "answer": "a"}])
    folder_of("pics", {"a.png": PNG[0]})
    assert chats(files_of("question-answer"), missing_picture=1) == []
    shutil.rmtree("data")
    assert chats(files_of("question-answer", pictures="pics")) == [
        [("user", PNG[0], "\nq"), ("assistant", "a")]
    ]


@pytest.mark.parametrize("folder", ["mine", "mine/train"])
def test_what_datasets_saves_for_itself_is_refused(folder):
    folder_of(folder, {"data-00000-of-00001.arrow": b"x", "state.json": b"{}"})
    with pytest.raises(DataError, match=r"mine is what `save_to_disk` of .* writes, which is not read"):
        made(files_of("question-answer"))


# Tars and classes


def fetched_by_img2dataset(folder="mine"):
    for tar in range(2):
        parts = {}
        for n in range(2):
            key = f"{tar:05d}{n:04d}"
            url = f"http://x/{tar}{n}"
            parts |= {f"{key}.jpg": JPEG[tar * 2 + n], f"{key}.txt": f"txt {tar}{n}".encode()}
            parts[f"{key}.json"] = json.dumps({"url": url, "key": key, "status": "success"}).encode()
        tarred(f"{folder}/{tar:05d}.tar", parts)


def test_capsfusion_is_a_picture_and_its_caption():
    fetched_by_img2dataset()
    tarred(
        "mine/00002.tar",
        {"1.jpg": JPEG[0], "2.txt": b"x", "3.jpg": JPEG[0], "3.1.png": PNG[0], "3.txt": b"x"},
    )
    tarred("mine/00003.tar", {"4.jpg": JPEG[0], "4.txt": b"\xff"})
    wrong = {"missing_caption": 1, "missing_picture": 1, "wrong_pictures": 1, "not_text": 1}
    assert chats(files_of("captions"), **wrong) == [
        [("assistant", JPEG[n], f"txt {n // 2}{n % 2}")] for n in range(4)
    ]


def test_captions_are_taken_out_of_parquet_by_key_or_by_address():
    fetched_by_img2dataset()
    keys = ["000000000", "000000001", "000010000"]
    table("mine/00000.parquet", [{"key": key, "caption": f"of {key}"} for key in keys])
    by_key = files_of({"name": "captions", "column": "caption"})
    assert chats(by_key, missing_caption=1) == [[("assistant", JPEG[n], f"of {keys[n]}")] for n in range(3)]
    table(
        "meta/a.parquet",
        [{"image_url": "u", "url": f"http://x/{n}", "capsfusion": f"fused {n}"} for n in ("00", "11")],
    )
    shape = {"name": "captions", "column": "capsfusion", "metadata": "meta", "by": "url"}
    assert chats(files_of(shape), missing_caption=2) == [
        [("assistant", JPEG[0], "fused 00")], [("assistant", JPEG[3], "fused 11")],
    ]  # fmt: skip
    with pytest.raises(DataError, match="has no column 'capsfusion', only key, caption"):
        made(files_of({"name": "captions", "column": "capsfusion"}))


def test_imagenet_21k_is_a_picture_and_the_name_of_its_class():
    tarred(
        "mine/w21-0000.tar",
        {"n01440764_10026.jpg": JPEG[0], "n01440764_10026.cls": b"0", "n02_1.jpg": JPEG[1]},
    )
    tarred("mine/w21-0001.tar", {"n00000001_3.jpg": JPEG[2]})
    Path("mapping.txt").write_text("n01440764 Tinca_tinca-x\nn00000001\torganism, being\n\n")
    shape = {"name": "imagenet-21k", "classes": "mapping.txt"}
    assert chats(files_of(shape), unknown_class=1) == [
        [("assistant", JPEG[0], "Tinca tinca x")], [("assistant", JPEG[2], "organism, being")],
    ]  # fmt: skip


def test_imagenet_is_a_folder_for_each_class():
    names = {
        "n01440764/n01440764_1.JPEG": JPEG[0],
        "n01440764/n01440764_2.JPEG": b"no picture",
        "n9/x.JPEG": JPEG[2],
    }
    folder_of("train", names)
    jsonl("category.jsonl", [{"id": "n01440764", "name": "Tench, Tinca"}, {"id": "n9", "name": "Nine"}])
    shape = {"name": "imagenet", "classes": "category.jsonl"}
    assert chats(files_of(shape, "train"), undecodable_picture=1) == [
        [("user", JPEG[0]), ("assistant", "tench, tinca")], [("user", JPEG[2]), ("assistant", "nine")],
    ]  # fmt: skip
    for wrong in (b"{}\n", b"{\n", b"n9\n", b"n9 \xff\n"):
        Path("category.jsonl").write_bytes(wrong)
        with pytest.raises(DataError, match=r"category.jsonl line 1 names no class"):
            ledger(files_of(shape, "train"))


# A file of the user's


OWN = """
def pictures(record):
    return [record["file"]]


def read(record, pictures):
    if record["skip"]:
        return None
    return [
        {"from": "human", "value": "<image>" + record["ask"]},
        {"from": "gpt", "value": record["say"]},
    ]
"""


def test_a_file_of_the_users_reads_records():
    Path("my_reader.py").write_text(OWN)
    folder_of("mine", {"a.jpg": JPEG[0]})
    row = {"file": "a.jpg", "ask": "what?", "say": "that", "skip": False}
    jsonl("mine/a.jsonl", [row, {**row, "skip": True}, {"file": "a.jpg"}, {}, {**row, "say": 3}])
    source = files_of("my_reader.py")
    assert chats(source, left_out=1, reader_failed=2, not_a_record=1) == [
        [("user", JPEG[0], "what?"), ("assistant", "that")]
    ]
    plan = planned(source)
    before = plan.settings(Raw(dataset="toy")), plan.settings(Chat(dataset="toy", shard=0))
    Path("my_reader.py").write_text(OWN.replace('"what"', '"which"') + "# another\n")
    after = plan.settings(Raw(dataset="toy")), plan.settings(Chat(dataset="toy", shard=0))
    assert all(one["told"] != other["told"] for one, other in zip(before, after, strict=True))
    with pytest.raises(DataError, match=r"my_reader.py was changed since this was planned"):
        shaped.check_told(before[1])


SAMPLE = """
from plait.data.chat import Message, Sample, Text
from plait.errors import RecordError

def read(record, pictures):
    if record["n"] == 1:
        raise RecordError("one is too few", reason="too_few")
    role = "user" if record["n"] else "alien"
    return Sample((Message(role, (Text(str(record["n"])),)),))
"""


def test_a_file_of_the_users_may_give_samples_and_reasons():
    Path("r.py").write_text(SAMPLE)
    jsonl("mine/a.jsonl", [{"n": n} for n in range(3)])
    assert chats(files_of("r.py"), too_few=1, unknown_role=1) == [[("user", "2")]]


def test_records_of_one_id_or_none_are_told_apart_by_their_lines():
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    Path("r.py").write_text("def read(record, pictures): return record['conversations']")
    rows = [{"conversations": said}, {"id": "p", "conversations": said}, {"id": "p", "conversations": said}]
    jsonl("mine/a.jsonl", rows)
    for shape in ("r.py", "llava", "allava", "llavar"):
        assert [one.id for one in ledger(files_of(shape))[0]] == ["toy-1", "toy-2", "toy-3"]
        shutil.rmtree("data")


@pytest.mark.parametrize("error", ["OSError()", "RuntimeError('x')", "StopIteration()", "KeyError(1)"])
def test_whatever_a_file_of_the_users_stumbles_over_the_record_is_rejected(error):
    Path("r.py").write_text(f"def read(record, pictures): raise {error}")
    jsonl("mine/a.jsonl", [{"n": 1}])
    assert chats(files_of("r.py"), reader_failed=1) == []


@pytest.mark.parametrize("part", ["Text('\\ud800')", "'words'", "Picture('a.png')", "Text(3)"])
def test_a_sample_of_the_users_holds_texts_and_pictures_and_nothing_else(part):
    Path("r.py").write_text(
        "from plait.data.chat import Message, Picture, Sample, Text\n"
        f"def read(record, pictures): return Sample((Message('assistant', ({part},)),))"
    )
    jsonl("mine/a.jsonl", [{"n": 1}])
    assert chats(files_of("r.py"), reader_failed=1) == []


BROKEN = {
    "def read(:": "SyntaxError",
    "def read(r, p): return undefined": "r.py cannot be used: NameError",
    "def pictures(r): import no_such_module\ndef read(r, p): pass": "No module named 'no_such_module'",
    "import no_such_module": "No module named 'no_such_module'",
    "1 / 0": "ZeroDivisionError",
    "import sys; sys.exit(3)": "SystemExit",
    "x = 1": "has no function `read`",
    "def read(r, p): return {}\n": "`read` of r.py gives dict",
    "read = len; pictures = 3": "`pictures` of r.py is no function",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_bad_file_of_the_users_ends_in_a_sentence(text):
    Path("r.py").write_text(text)
    jsonl("mine/a.jsonl", [{"n": 1}])
    with pytest.raises(DataError) as error:
        ledger(files_of("r.py"))
    assert BROKEN[text] in str(error.value)


# Laws


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "a.json"])
def test_records_are_the_same_whatever_the_number_of_shards(name):
    rows = [{"text": f"t{n}"} for n in range(23)]
    Path("mine").mkdir()
    for part in range(3):
        write = {"a.parquet": table, "a.jsonl.zst": jsonl}.get(
            name, lambda path, rows: Path(path).write_text(json.dumps(rows))
        )
        write(f"mine/{part}{name}", rows[part * 8 : part * 8 + 8])
    known = [(f"toy-{n + 1}", f"t{n}") for n in range(23)]
    for count in (1, 2, 5, 23):
        found, _, _ = ledger(files_of("text"), count)
        assert [(one.id, one.messages[0].parts[0].text) for one in found] == known
    whole, _, _ = ledger({**files_of("text"), "share": 0.5})
    again, _, left = ledger({**files_of("text"), "share": 0.5}, 4)
    assert whole == again
    assert left == {"not_drawn": 23 - len(whole)}


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), count=st.integers(1, 12))
def test_every_record_is_in_one_shard(sizes, count, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    listed = []
    for n, size in enumerate(sizes):
        (folder / f"{n}.jsonl").write_bytes(b"".join(b'{"n": "%d-%d"}\n' % (n, m) for m in range(size)))
        listed.append({"file": f"{n}.jsonl", "records": size})
    files.write_json(folder / shaped.INDEX, {"files": listed})
    files.write_manifest(folder, kind="raw", settings={})
    source = {"share": 1.0}
    found = [list(shaped.stretch(source, folder, one, count)) for one in range(count)]
    joined = [line for part in found for line in part]
    assert [line.position for line in joined] == list(range(1, sum(sizes) + 1))
    assert [(line.file, line.number) for line in joined] == [
        (f"{n}.jsonl", m + 1) for n, size in enumerate(sizes) for m in range(size)
    ]
    assert max(map(len, found)) - min(map(len, found)) <= 1


@settings(deadline=None, max_examples=30)
@given(
    names=st.lists(
        st.from_regex(r"[a-z]{1,2}(/[a-z]{1,2}){0,2}", fullmatch=True), min_size=1, max_size=6, unique=True
    )
)
def test_a_picture_is_found_by_its_whole_name(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    tarred(folder / "x.tar", {name: name.encode() for name in names})
    with albums.Album(folder / "x.tar", folder / "names") as album:
        assert [albums.read(album.root, album.place(name)).decode() for name in names] == names
        assert albums.read(album.root, album.place(f"zzz/{names[0]}")).decode() == names[0]
        assert album.place("nothing") is None
    assert not (folder / "names").exists()


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    records=st.lists(JSONS, max_size=6), chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]),
    before=JSONS, after=JSONS,
)  # fmt: skip
def test_members_are_those_that_json_knows(records, chunk, indent, before, after, tmp_path_factory):
    path = tmp_path_factory.mktemp("members") / "a.json"
    whole = {
        None: (records, records),
        "qa_pairs": ({"a": before, "qa_pairs": records, "z": after}, records),
        "": (
            {str(n): {"n": one} for n, one in enumerate(records)},
            [{"id": str(n), "n": one} for n, one in enumerate(records)],
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "CHUNK", chunk)
        for inside, (value, wanted) in whole.items():
            path.write_text(json.dumps(value, indent=indent))
            assert list(members.members(path, inside=inside)) == wanted


def test_a_shards_job_reads_its_own_files_only():
    for n in range(3):
        jsonl(f"mine/{n}.jsonl", [{"text": f"t{n}"}])
    folder, _ = made(files_of("text"))
    jsonl("mine/2.jsonl", [{"text": "edited"}])
    settings = planned(files_of("text"), 3)
    for n in range(2):
        shard = Chat(dataset="toy", shard=n)
        shards.write(folder, shard, settings.settings(shard))
    shard = Chat(dataset="toy", shard=2)
    with pytest.raises(DataError, match=r"files/2.jsonl is not the file of 15 bytes"):
        shards.write(folder, shard, settings.settings(shard))


def test_a_changed_picture_is_found():
    folder_of("mine", {"bar_0.png": PNG[0]})
    Path("mine/q.json").write_text(json.dumps([asks(0)]))
    folder, _ = made(files_of("dvqa"))
    folder_of("mine", {"bar_0.png": PNG[1]})
    shard = Chat(dataset="toy", shard=0)
    with pytest.raises(DataError, match=r"picture bar_0.png in .* is not what it was"):
        shards.write(folder, shard, planned(files_of("dvqa")).settings(shard))


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", r'"\ud800"'])
def test_what_json_has_not_is_rejected_by_the_place_of_its_record(value):
    folder_of("mine", {"a.json": f'[{{"text": "x"}}, {{"text": "x", "n": {value}}}]'.encode()})
    found, reasons, _ = ledger(files_of("text"))
    assert (len(found), reasons) == (1, {"bad_json": 1})
    (line,) = map(json.loads, Path("data/processed/toy/shard_00000.rejects.jsonl").read_text().splitlines())
    assert (line["file"], line["line"]) == ("files/a.json", 2)


@pytest.mark.parametrize("depth", [500, 990, 1000, 1010, 1020, 3000])
def test_a_record_that_is_nested_deeper_than_json_goes_is_rejected(depth):
    deep = b'{"text": "x", "n": ' + b"[" * depth + b"]" * depth + b"}"
    folder_of("mine", {"a.jsonl": b'{"text": "x"}\n' + deep + b"\n", "b.json": b'[{"text": "y"}]'})
    found, reasons, _ = ledger(files_of("text"))
    assert len(found) + sum(reasons.values()) == 3
    assert set(reasons) <= {"bad_json"}


DAMAGED = {
    "a.parquet": (b"PAR1 no", "cannot be read as parquet"),
    "a.jsonl.zst": (b"no", "is named .zst but does not hold such data"),
    "a.json": (b'[{"text": "x"}', "has neither comma nor end after record 1"),
    "b.json": (b'{"text": "x"}', "is no list of records"),
    "c.json": (b"[" * 100_000, "cannot be read after record 0: maximum recursion depth"),
    "a.txt": (b"x", "holds none of the files that are read"),
    "a.zip": (b"x", "holds records of shape text"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_ends_in_a_sentence(name):
    folder_of("mine", {name: DAMAGED[name][0]})
    with pytest.raises(DataError, match=DAMAGED[name][1]):
        made(files_of("text"))


def test_every_shape_of_config_is_read_and_no_other():
    definitions = json.loads((Path(__file__).parents[2] / "config/schema.json").read_text())["$defs"]
    named = set()
    for one in definitions["Files"]["properties"]["shape"]["anyOf"]:
        if "$ref" in one:
            name = definitions[one["$ref"].rpartition("/")[2]]["properties"]["name"]
            named |= set(name.get("enum", [name.get("const")]))
    assert named == set(shapes.SHAPES)


SAID = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
WHOLE = {
    # a record of each shape that reads records, and what its source chooses
    "allava": ({"image": JPEG[0], "conversations": SAID}, {}),
    "c4": ({"text": "x"}, {}),
    "capybara": ({"conversation": [{"input": "a", "output": "b"}]}, {}),
    "cauldron": ({"images": [JPEG[0]], "texts": [{"user": "q", "assistant": "a"}]}, {}),
    "chat": ({"id": "x", "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, {}),
    "dvqa": ({"image": JPEG[0], "question": "q", "answer": "a"}, {}),
    "figureqa": ({"image_index": 0, "question_string": "q", "answer": 1}, {}),
    "mmc4": (MMC4, {"missing": "skip"}),
    "ocr-vqa": ({"image": JPEG[0], **cover()}, {"splits": (1,)}),
    "openorca": ({"id": "x", "system_prompt": "s", "question": "q", "response": "r"}, {"ids": ""}),
    "question-answer": (
        {"image": {"bytes": JPEG[0]}, "question": "q", "answer": ["a"]},
        {"image": "image", "question": "question", "answer": "answer"},
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}]}, {"min_turns": 0}),
    "slimpajama": ({"text": "x", "meta": {"redpajama_set_name": "y"}}, {"leave_out": ()}),
    "websight": ({"image": JPEG[0], "text": "x"}, {}),
}
STRANGE = JSONS | st.sampled_from([JPEG[1], "<image>", "human", {}, [], [None], {"bytes": None}, 2**70])


def places(value, at=()):
    """Where something stands in a record, itself first."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def changed(value, at, other):
    """The record with something else in a place."""
    if not at:
        return other
    copy = value.copy()
    copy[at[0]] = changed(value[at[0]], at[1:], other)
    return copy


@pytest.mark.parametrize("name", WHOLE)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_stands_in_a_record_it_is_a_conversation_or_has_a_reason(name, data):
    record, chosen = WHOLE[name]
    read = shaped.reader({"shape": {"name": name, **chosen}})
    at = data.draw(st.sampled_from([*places(record)]))
    try:
        found = read(shaped.Noted(changed(record, at, data.draw(STRANGE))), Path())
    except RecordError as error:
        found = error
    assert found.reason if isinstance(found, RecordError) else found.to_line("x")


# Memory


MEASURE = """
import sys
from pathlib import Path
from plait import files
from plait.config.model import load
from plait.config.plan import Plan
from plait.data import shards, sources
from plait.layout import Chat, Raw, said_of
source = {"kind": "files", "path": sys.argv[1], "shape": sys.argv[2]}
plan = Plan(load({"datasets": {"toy": {"source": source}}}))
source = plan.settings(Raw(dataset="toy"))["source"]
folder = Path("data/raw/toy")
with files.appears_whole(folder, folder=True) as part:
    facts = sources.make(source, part)
    files.write_manifest(part, kind="raw", settings={}, facts=facts, unlisted=sources.unlisted(source))
shard = Chat(dataset="toy", shard=0)
shards.write(folder, shard, plan.settings(shard))
found = Path("/proc/self/status").read_text()  # getrusage would count what pytest had before it started this
print(int(found.partition("VmHWM:")[2].split()[0]) * 1024 // 10**6)
"""


def peak(path, shape):
    """MB of the largest memory of a process that makes a source and its records."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, shape],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    return int(done.stdout.split()[-1])


def large(folder, count):
    """So many records in each container: 20 KB of text, or a picture of 20 KB of noise."""
    rows = [{"text": f"{n} " * 4000, "meta": {}} for n in range(count)]
    jsonl(f"{folder}/text/a.jsonl.zst", rows)
    Path(f"{folder}/list").mkdir()
    Path(f"{folder}/list/a.json").write_text(json.dumps(rows))
    noisy = os.urandom(20_000)
    found = ({"image": embedded(PNG[0] + noisy), "text": f"{n}"} for n in range(count))
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())]
    )
    Path(f"{folder}/parquet").mkdir()
    with parquet.ParquetWriter(f"{folder}/parquet/a.parquet", schema) as writer:
        writer.write_table(pa.Table.from_pylist(list(found), schema=schema), row_group_size=10**6)
    tarred(
        f"{folder}/tar/a.tar",
        {f"{n}.{end}": part for n in range(count) for end, part in (("png", PNG[0] + noisy), ("txt", b"x"))},
    )


@pytest.mark.parametrize(
    "kinds",
    [
        [("parquet", "websight"), ("list", "text")],
        pytest.param([("text", "text"), ("tar", "captions")], marks=pytest.mark.long),
    ],
)
def test_memory_does_not_grow_with_the_input(kinds):
    large("small", 300)
    large("large", 3000)
    for kind, shape in kinds:
        small, big = peak(f"small/{kind}", shape), peak(f"large/{kind}", shape)
        assert big < small + 30, f"{kind}: {small} MB and {big} MB"
        assert big < 300


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_five_gigabytes_need_no_more_memory_than_five_megabytes(name):
    row = json.dumps({"text": "word " * 4000, "meta": {}})
    count = 5 * 10**9 // len(row)
    between = ",\n" if name == "a.json" else "\n"
    with Path(name).open("w") as out:
        out.write("[" if name == "a.json" else "")
        out.writelines(f"{between if n else ''}{row}" for n in range(count))
        out.write("]" if name == "a.json" else "\n")
    try:
        assert Path(name).stat().st_size > 4.99e9
        assert peak(name, "text") < 300
    finally:
        shutil.rmtree("data")
        Path(name).unlink()


# Keys

KEYS = {
    "no such shape": ({"shape": "nonsense"}, "nonsense"),
    "no such key": ({"shape": {"name": "mmc4", "skip": True}}, "skip"),
    "pictures of text": (
        {"shape": "c4", "pictures": "x"},
        "records of shape c4 name none that lie elsewhere",
    ),
    "no classes": ({"shape": "imagenet"}, "classes"),
    "two ways": (
        {"kind": "hub", "repo": "a/b", "files": ["*"], "shape": "c4", "as_kind": "tars", "path": None},
        "as_kind and shape both say how the files are read",
    ),
    "share of nothing": (
        {"kind": "hub", "repo": "a/b", "files": ["*"], "share": 0.5, "path": None},
        "share is of",
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_do_not_fit_are_refused_in_planning(name):
    given, sentence = KEYS[name]
    source = {
        key: value for key, value in {"kind": "files", "path": "x", **given}.items() if value is not None
    }
    with pytest.raises(ConfigError, match=sentence):
        planned(source)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"shape": "r.py"}, "datasets.toy.source.shape.path: r.py does not exist"),
        ({"shape": {"name": "imagenet", "classes": "c.txt"}}, "source.shape.classes: c.txt does not exist"),
        ({"shape": "dvqa", "pictures": "p.zip"}, "source.pictures: p.zip does not exist"),
        ({"shape": "dvqa", "path": "q"}, "source.path: q does not exist"),
    ],
)
def test_what_a_source_is_made_from_must_be_there(source, sentence):
    Path("mine").mkdir()
    with pytest.raises(ConfigError, match=sentence):
        planned({"kind": "files", "path": "mine", **source}).sources(Raw(dataset="toy"))


def test_a_name_is_short_for_a_shape_and_sizes_of_all_files_are_known():
    jsonl("mine/a.jsonl.gz", [{"text": "x"}])
    folder_of("mine", {"b.parquet": b"12", "c.txt": b"1", "d/e.tar": b"123"})
    plan = planned(files_of("c4"))
    assert plan.settings(Raw(dataset="toy"))["source"]["shape"] == {"name": "c4"}
    assert plan.sizes(Raw(dataset="toy")) == {
        "a.jsonl.gz": Path("mine/a.jsonl.gz").stat().st_size, "b.parquet": 2, "d/e.tar": 3,
    }  # fmt: skip
    assert planned(files_of("r.py")).dataset("toy").source.shape.path == "r.py"
