import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import BIG, COMMIT, SMALL, Hub

from plait import layout


@pytest.fixture
def hub():
    """A hub with one model and one dataset; nothing goes wrong yet."""
    hub = Hub(
        repos={
            "models/us/tiny": {
                "config.json": SMALL,
                "model.safetensors": BIG,
                "pytorch_model.bin": b"a pickle",
            },
            "datasets/us/talks": {
                "README.md": b"# talks\n",
                "data/a-0.parquet": BIG,
                "data/b c.jsonl": SMALL,
            },
        }
    ).start()
    yield hub
    hub.stop()


class Place:
    """A working folder with a config of its own, in which plait's commands are run."""

    def __init__(self, folder, endpoint):
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(folder / "home"), "HF_ENDPOINT": endpoint,
        }  # fmt: skip
        (folder / "config").mkdir(parents=True)
        self.config({"raw_hf": {"tiny": {"kind": "hub", "repo": "us/tiny"}}})

    def config(self, values):
        (self.folder / "config/config.yaml").write_text(json.dumps(values))

    def start(self, *words, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "plait.cli.main", *words], cwd=self.folder, text=True,
            env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def plait(self, *words, code=0, **environment):
        """What a command says."""
        process = self.start(*words, **environment)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == code, said
        assert code == 0 or "Traceback" not in said
        return said

    def file(self, name, repo="models--us--tiny"):
        return str(layout.HubFile(repo=repo, commit=COMMIT, file=name))

    def read(self, path):
        return (self.folder / path).read_bytes()

    def beside(self, path):
        """What stands in the folder of a file."""
        return sorted(one.name for one in (self.folder / path).parent.iterdir())

    @property
    def lock(self):
        return json.loads((self.folder / "config/hub.lock.json").read_text())


@pytest.fixture
def place(tmp_path, hub):
    return Place(tmp_path / "place", hub.url)


@pytest.fixture
def locked(place):
    """A place whose config is locked."""
    place.plait("lock")
    return place


@pytest.fixture
def caches(tmp_path):
    """A function that puts a file into a cache as huggingface_hub has it; the cache."""

    def put(name, content, repo="models--us--tiny"):
        home = Path(tmp_path / "hf")
        blob = home / "hub" / repo / "blobs" / name.replace("/", "_")
        link = home / "hub" / repo / "snapshots" / COMMIT / name
        for one in (blob, link):
            one.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
        return str(home)

    return put
