"""Downloads from a hub on this machine: whole, checked file by file, and its refusals in a sentence."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from makers import Maker

from plait.models.weights import FolderTensors, merkle

SHA = "0123456789abcdef0123456789abcdef01234567"


def oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The few answers that huggingface_hub asks for."""

    files: ClassVar = {}
    corrupt = ""

    def log_message(self, *words):
        pass

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/gone/" in path:
            self.answer(404, b"", X_Error_Code="RepoNotFound")
        elif "/closed/" in path:
            self.answer(403, b"", X_Error_Code="GatedRepo")
        elif path.startswith("/api/models/us/tiny/tree"):
            self.answer(200, json.dumps([self.listing(n)[1] for n in self.files]).encode())
        elif path.startswith("/api/models/us/tiny"):
            siblings = [self.listing(name)[0] for name in self.files]
            content = {"id": "us/tiny", "sha": SHA, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
        elif "/resolve/" in path:
            self.file(path.rpartition("/")[2])
        else:
            self.answer(404, b"")

    def listing(self, name):
        content = self.files[name]
        large = name.endswith(".safetensors")
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        sibling = {"rfilename": name, "size": len(content), "blobId": oid(content)}
        entry = {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
        if large:
            return {**sibling, "lfs": lfs}, {**entry, "lfs": {**lfs, "oid": lfs["sha256"]}}
        return sibling, entry

    def file(self, name):
        content = self.files[name]
        large = name.endswith(".safetensors")
        etag = hashlib.sha256(content).hexdigest() if large else oid(content)
        if name == self.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=SHA, Accept_Ranges="bytes")


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(maker):
    source = maker.hf()
    Hub.files = {
        path.name: path.read_bytes()
        for path in source.iterdir()
        if path.is_file() and path.name != "plait.json"
    }
    Hub.files["pytorch_model.bin"] = b"a pickle"
    Hub.corrupt = ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def build(folder, endpoint, repo="us/tiny", **environment):
    """In a process of its own: huggingface_hub reads its endpoint when it is imported."""
    folder.mkdir()
    script = (
        "import sys, json; from pathlib import Path; from plait.errors import PlaitError\n"
        "from plait.models.build import build\n"
        "try: print(json.dumps(build(Path(sys.argv[1]), {'kind': 'hub', 'repo': sys.argv[2]}, [])))\n"
        "except PlaitError as error: print(error, file=sys.stderr); sys.exit(2)\n"
    )
    clean = {"PATH": "/usr/bin", "HOME": str(folder.parent), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-c", script, str(folder), repo]
    return subprocess.run(words, capture_output=True, text=True, env={**clean, **environment}, check=False)


def test_a_model_comes_whole_without_pickles(hub, maker, tmp_path):
    done = build(tmp_path / "model", hub)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == {"merkle": merkle(FolderTensors(maker.hf())), "commit": SHA}
    there = {path.name for path in Path(tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= there
    assert not there & {"pytorch_model.bin", ".cache"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_found(hub, tmp_path, name):
    Hub.corrupt = name
    done = build(tmp_path / "model", hub)
    assert done.returncode == 2
    assert f"{name} of us/tiny came with digest" in done.stderr


@pytest.mark.parametrize(
    ("repo", "environment", "sentence"),
    [
        ("gone/model", {}, "the hub has no gone/model at revision main"),
        ("closed/model", {}, "closed/model at revision main is gated"),
        ("us/tiny", {"HF_HUB_OFFLINE": "1"}, "cannot be fetched: OfflineModeIsEnabled"),
    ],
)
def test_refusals_are_sentences(hub, tmp_path, repo, environment, sentence):
    done = build(tmp_path / "model", hub, repo, **environment)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr


def test_a_model_of_pickles_only_is_refused(hub, tmp_path):
    Hub.files = {name: content for name, content in Hub.files.items() if not name.endswith(".safetensors")}
    done = build(tmp_path / "model", hub)
    assert done.returncode == 2
    assert "has no safetensors, only pytorch_model.bin and the like" in done.stderr
