"""What the originals did at the start of training, tried on a whole `plait train`."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from jobs import pictured

from plait.convert import checkpoint
from plait.parallel.grid import Grid


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A run over pictures on one process, trained."""
    place = pictured(tmp_path_factory.mktemp("pictures"))
    place.train()
    return place


@pytest.fixture
def hub():
    """A hub on this machine that writes down what it is asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def parse_request(self):
            asked.append(self.raw_requestline)
            return False

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.long
def test_seed_16_training_asks_no_hub(pictures, hub, tmp_path):
    address, asked = hub
    place = pictures.copy(tmp_path)
    process = place.begin(
        env={"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    )
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said
    assert asked == []
    assert place.result() == pictures.result()


@pytest.mark.long
def test_seed_25_lengths_in_a_checkpoint_change_nothing(pictures, tmp_path):
    place = pictures.copy(tmp_path)
    (tmp_path / "data/models").unlink()
    start = tmp_path / place.start
    start.parent.mkdir(parents=True)
    shutil.copytree(Path(pictures.root / place.start).resolve(), start)
    path = checkpoint.rank_file(start, Grid(), 0, 0)
    content = torch.load(path, weights_only=False)
    content["args"].seq_length = content["args"].max_position_embeddings = 7
    torch.save(content, path)

    place.train()

    assert place.result() == pictures.result()
