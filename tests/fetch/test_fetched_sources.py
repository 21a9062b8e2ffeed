"""Raw sources from the hub and from URLs, by the commands that a job runs."""

import hashlib
import io
import json
import tarfile
import zipfile

import pyarrow as pa
import pytest
from hub_server import COMMIT
from pyarrow import parquet
from talks import picture

from plait import layout

TALKS = [
    {
        "id": f"t{n}",
        "conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"No. {n}"}],
    }
    for n in range(5)
]
CODEACT = "data/codeact-00000-of-00001-41e65239aebc832c.parquet"
LINES = b"".join(json.dumps(talk).encode() + b"\n" for talk in TALKS)


def as_parquet(rows):
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def zipped(members, packed=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packed) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return out.getvalue()


def tarred(members, mode="w:gz"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return out.getvalue()


def asked(number, **more):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {number}."}]
    return {"id": f"r{number}", "image": f"0000{number}/{number}.jpg", "conversations": turns, **more}


PICTURES = {f"0000{n}/{n}.jpg": picture(n).encoded for n in range(3)}
LLAVA = json.dumps([asked(n) for n in range(3)]).encode()


def brought(place, source):
    """Lock, fetch what the source comes as, make the source, and read it; its chat records."""
    from plait.config.model import load
    from plait.config.plan import Plan

    place.config({"datasets": {"x": {"source": source, "reject_limit": 1.0}}})
    place.plait("lock")
    (place.folder / "here").mkdir(exist_ok=True)
    plan = Plan(load({"datasets": {"x": {"source": source}}}))
    plan.lock.path = place.folder / "config/hub.lock.json"
    for file in plan.fetched("datasets.x"):
        place.plait("fetch", str(file))
    place.plait("raw", "data/raw/x")
    place.plait("chat", "data/raw/x", "data/processed/x/shard_00000.jsonl.gz")
    return records(place)


def records(place):
    from plait.data import shards

    return list(shards.read(place.folder / "data/processed/x/shard_00000.jsonl.gz"))


def ledger(place):
    return json.loads(place.read("data/processed/x/shard_00000.ledger.json"))


def test_a_split_of_code_act_becomes_lines(hub, place):
    hub.repos["datasets/xingyaoww/code-act"] = {
        CODEACT: as_parquet(TALKS),
        "data/general-00000-of-00001-d4bf3f50dd590916.parquet": as_parquet(TALKS[:1]),
        "README.md": b"",
    }
    source = {"kind": "hub", "repo": "xingyaoww/code-act", "files": ["data/codeact-*.parquet"]}
    found = brought(place, source)
    assert [one.id for one in found] == [f"t{n}" for n in range(5)]
    assert [path for path, _ in hub.files_asked()] == [
        f"/datasets/xingyaoww/code-act/resolve/{COMMIT}/{CODEACT}"
    ]
    manifest = json.loads(place.read("data/raw/x/plait.json"))
    assert manifest["settings"]["commit"] == COMMIT
    assert list(manifest["inputs"]) == [
        f"data/hub/datasets--xingyaoww--code-act/{COMMIT}.checked/{CODEACT}.json"
    ]


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["", "images/"])
def test_llava_pretrain_reads_its_pictures_in_the_zip(hub, place, packed, top):
    pictures = {f"{top}{name}": content for name, content in PICTURES.items()}
    hub.repos["datasets/liuhaotian/LLaVA-Pretrain"] = {
        "blip_laion_cc_sbu_558k.json": LLAVA,
        "blip_laion_cc_sbu_558k_meta.json": b"[]",
        "images.zip": zipped(pictures, packed),
    }
    source = {
        "kind": "hub", "repo": "liuhaotian/LLaVA-Pretrain", "as_kind": "llava-json",
        "files": ["blip_laion_cc_sbu_558k.json", "images.zip"],
    }  # fmt: skip
    found = brought(place, source)
    assert [one.messages[0].parts[0] for one in found] == [picture(n) for n in range(3)]
    there = {one.name for one in (place.folder / "data/raw/x").iterdir()}
    assert there == {"files", "pictures", "records.jsonl", "plait.json"}
    assert not list(place.folder.rglob("*.jpg")), "no picture becomes a file"
    assert "pictures" not in json.loads(place.read("data/raw/x/plait.json"))["files"]


def test_a_changed_zip_is_found_picture_by_picture(hub, place):
    content = zipped(PICTURES)
    hub.repos["datasets/us/p"] = {"a.json": LLAVA, "images.zip": content}
    source = {"kind": "hub", "repo": "us/p", "as_kind": "llava-json", "files": ["*"]}
    brought(place, source)
    path = place.folder / place.file("images.zip", repo="datasets--us--p")
    at = content.index(PICTURES["00001/1.jpg"]) + 40
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    said = place.plait("chat", "data/raw/x", "data/processed/x/shard_00000.jsonl.gz", code=2)
    assert "00001/1.jpg is not the file that became a raw source" in said


def test_a_picture_that_the_zip_lacks_is_rejected_with_its_reason(hub, place):
    hub.repos["datasets/us/p"] = {"a.json": LLAVA, "images.zip": zipped({"00000/0.jpg": picture(0).encoded})}
    found = brought(place, {"kind": "hub", "repo": "us/p", "as_kind": "llava-json", "files": ["*"]})
    assert len(found) == 1
    assert ledger(place)["reasons"] == {"missing_picture": 2}


URLS = {
    "talks.tgz": ("chat-jsonl", tarred({"a/talks.jsonl": LINES, "a/notes.txt": b"no"})),
    "talks.zip": ("chat-jsonl", zipped({"talks.jsonl": LINES})),
    "talks.jsonl": ("chat-jsonl", LINES),
    "all.tgz": ("llava-json", tarred({"list.json": LLAVA, **PICTURES})),
    "all.zip": ("llava-json", zipped({"list.json": LLAVA, **PICTURES})),
    "shards.tgz": (
        "tars",
        tarred({"s/000.tar": tarred({"k.jpg": PICTURES["00000/0.jpg"], "k.txt": b"A dog"}, "w")}),
    ),
    "000.tar": ("tars", tarred({"k.jpg": PICTURES["00000/0.jpg"], "k.txt": b"A dog"}, "w")),
}  # fmt: skip
COUNTS = {"chat-jsonl": 5, "llava-json": 3, "tars": 1}


@pytest.mark.parametrize("name", URLS)
def test_an_archive_by_url_becomes_records(hub, place, name):
    kind, content = URLS[name]
    hub.urls[f"/d/{name}"] = content
    hub.faults.cuts = [len(content) // 2]
    digest = hashlib.sha256(content).hexdigest()
    source = {"kind": "url", "url": f"{hub.url}/d/{name}", "sha256": digest, "as_kind": kind}
    assert len(brought(place, source)) == COUNTS[kind]
    assert hub.files_asked()[-1][1] == f"bytes={len(content) // 2}-"
    assert not (place.folder / "config/hub.lock.json").exists(), "config/ has the digest: nothing to lock"


def test_the_first_fetch_of_a_url_locks_its_digest_and_later_ones_must_match(hub, place):
    hub.urls["/d/talks.tgz"] = URLS["talks.tgz"][1]
    url = f"{hub.url}/d/talks.tgz"
    brought(place, {"kind": "url", "url": url})
    digest = hashlib.sha256(URLS["talks.tgz"][1]).hexdigest()
    assert place.lock == {url: {"bytes": len(URLS["talks.tgz"][1]), "sha256": digest}}
    file = str(layout.HubFile.of_url(url))
    (place.folder / file).unlink()
    hub.urls["/d/talks.tgz"] = tarred({"a/talks.jsonl": LINES[:50]})
    said = place.plait("fetch", file, code=2)
    assert "came twice as something else" in said


def test_the_first_fetch_of_a_url_warns(hub, place):
    hub.urls["/d/talks.tgz"] = URLS["talks.tgz"][1]
    url = f"{hub.url}/d/talks.tgz"
    place.config({"datasets": {"x": {"source": {"kind": "url", "url": url}}}})
    said = place.plait("fetch", str(layout.HubFile.of_url(url)))
    assert "Nobody vouches for this first fetch" in said


def test_a_url_without_a_digest_goes_on_only_with_the_same_file(hub, place):
    first, second = bytes(300_000), b"x" * 300_000
    hub.urls["/d/a.jsonl"] = first
    url = f"{hub.url}/d/a.jsonl"
    place.config({"datasets": {"x": {"source": {"kind": "url", "url": url}}}})
    file = str(layout.HubFile.of_url(url))
    hub.faults.cuts, hub.faults.statuses = [100_000], [None, 403]
    place.plait("fetch", file, code=2)
    hub.urls["/d/a.jsonl"] = second
    place.plait("fetch", file)
    assert hub.files_asked()[-1][1] == "bytes=100000-", "it asked to go on, and the server's tag said no"
    assert place.read(file) == second


def test_a_wrong_digest_in_config_is_refused(hub, place):
    hub.urls["/d/talks.tgz"] = URLS["talks.tgz"][1]
    url = f"{hub.url}/d/talks.tgz"
    place.config({"datasets": {"x": {"source": {"kind": "url", "url": url, "sha256": "0" * 64}}}})
    said = place.plait("fetch", str(layout.HubFile.of_url(url)), code=2)
    assert "came twice as something else: sha256" in said
    assert "listed is 000000000000" in said


def test_an_evil_archive_leaves_no_source(hub, place):
    content = tarred({"talks.jsonl": LINES, "../../../evil": b"x"})
    hub.urls["/d/talks.tgz"] = content
    url = f"{hub.url}/d/talks.tgz"
    place.config({"datasets": {"x": {"source": {"kind": "url", "url": url}}}})
    place.plait("fetch", str(layout.HubFile.of_url(url)))
    assert "which leads out of its folder" in place.plait("raw", "data/raw/x", code=2)
    assert not list((place.folder / "data/raw").iterdir())
    assert not list(place.folder.rglob("evil"))


def test_a_source_that_is_not_fetched_is_refused(hub, place):
    place.config({"datasets": {"x": {"source": {"kind": "hub", "repo": "us/talks", "files": ["data/*"]}}}})
    assert "datasets/us/talks@main is not locked" in place.plait("raw", "data/raw/x", code=2)
    place.plait("lock")
    assert ".checked/data/a-0.parquet.json does not exist" in place.plait("raw", "data/raw/x", code=2)


def test_parquet_of_something_else_is_a_sentence(hub, place):
    hub.repos["datasets/us/talks"] = {"a.parquet": b"PAR1 no parquet PAR1"}
    source = {"kind": "hub", "repo": "us/talks", "files": ["a.parquet"]}
    place.config({"datasets": {"x": {"source": source}}})
    place.plait("lock")
    place.plait("fetch", place.file("a.parquet", repo="datasets--us--talks"))
    assert "cannot be read as parquet" in place.plait("raw", "data/raw/x", code=2)


def test_pictures_of_ones_own_may_lie_in_a_zip_too(place):
    (place.folder / "mine").mkdir()
    (place.folder / "mine/list.json").write_bytes(LLAVA)
    (place.folder / "mine/all.zip").write_bytes(zipped(PICTURES))
    source = {"kind": "llava-json", "path": "mine/list.json", "images": "mine/all.zip"}
    found = brought(place, source)
    assert [one.messages[0].parts[0] for one in found] == [picture(n) for n in range(3)]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5\n"


@pytest.mark.parametrize(
    ("kind", "name"), [("chat-jsonl", "a.jsonl"), ("tars", "0.tar"), ("llava-json", "list.json")]
)
def test_a_clone_without_its_large_files_is_refused(place, kind, name):
    (place.folder / "clone").mkdir()
    (place.folder / "clone" / name).write_bytes(POINTER)
    path = f"clone/{name}" if kind == "llava-json" else "clone"
    place.config({"datasets": {"x": {"source": {"kind": kind, "path": path}}}})
    said = place.plait("raw", "data/raw/x", code=2)
    assert f"{name} is a pointer of git LFS: the large files were never fetched" in said
    assert f"git -C {place.folder}/clone lfs pull" in said


def test_records_of_a_shape_come_with_their_zips_of_pictures(hub, place):
    hub.repos["datasets/us/allava"] = {
        "laion/caption.json": LLAVA,
        "laion/chunks/images_0.zip": zipped({"x/00000/0.jpg": PICTURES["00000/0.jpg"]}),
        "laion/chunks/images_1.zip": zipped({"1.jpg": PICTURES["00001/1.jpg"]}, zipfile.ZIP_DEFLATED),
    }
    source = {
        "kind": "hub", "repo": "us/allava", "files": ["laion/*.json", "laion/*/*.zip"], "shape": "allava",
    }  # fmt: skip
    found = brought(place, source)
    assert [one.messages[0].parts[0] for one in found] == [picture(n) for n in range(2)]
    assert ledger(place)["reasons"] == {"missing_picture": 1}
    listed = json.loads(place.read("data/raw/x/plait.json"))["files"]
    assert not any(name.endswith(".zip") or name == "pictures" for name in listed)
    assert not list((place.folder / "data/raw").rglob("*.jpg")), "no picture becomes a file"


def test_an_archive_by_url_is_unpacked_for_a_shape(hub, place):
    members = {"qa/train_qa.json": b'[{"image": "0.jpg", "question": "q", "answer": "a"}]'}
    hub.urls["/d/dvqa.tar.gz"] = tarred({**members, "images/0.jpg": PICTURES["00000/0.jpg"]})
    found = brought(place, {"kind": "url", "url": f"{hub.url}/d/dvqa.tar.gz", "shape": "dvqa"})
    assert [one.messages[0].parts[0] for one in found] == [picture(0)]
