"""One writer at a time: who is gone is followed, who lives is waited for."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from plait.errors import DataError
from plait.fetch import claim as module
from plait.fetch.claim import claim


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".x.claim"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "STALE", 0.3)
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "LOOK", 0.02)


def test_a_claim_leaves_nothing(path):
    with claim(path, "x") as held:
        assert held.held
        assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert list(path.parent.iterdir()) == []


def test_only_one_holds_it_of_many(path, quick):
    inside, most, done = [], [], []

    def work():
        with claim(path, "x"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(done) == 12
    assert set(most) == {1}


def test_a_killed_process_of_this_machine_is_followed_at_once(path, caplog):
    caplog.set_level("INFO")
    script = (
        "import sys, time; from pathlib import Path; from plait.fetch.claim import claim\n"
        "with claim(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(60)\n"
    )
    words = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
        other.wait()
    begin = time.monotonic()
    with claim(path, "x") as held:
        assert held.held
    assert time.monotonic() - begin < 5
    assert f"taken over from process {other.pid} on {socket.gethostname()}" in caplog.text


@pytest.mark.parametrize(
    "text", [json.dumps({"host": "elsewhere", "pid": 1, "started": "5"}), "", "not json"]
)
def test_one_of_another_machine_is_followed_when_it_stands_still(path, quick, text):
    path.write_text(text)
    begin = time.monotonic()
    with claim(path, "x"):
        assert time.monotonic() - begin > 0.3


def test_one_of_another_machine_that_lives_is_waited_for(path, quick):
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "5"}))
    end = threading.Event()

    def beats():
        while not end.wait(0.05):
            os.utime(path)

    other = threading.Thread(target=beats)
    other.start()
    threading.Timer(1.0, lambda: (end.set(), other.join(), path.unlink())).start()
    begin = time.monotonic()
    with claim(path, "x"):
        assert time.monotonic() - begin > 0.9


def test_a_process_that_was_stopped_for_long_learns_that_it_lost(path):
    with claim(path, "x") as held:
        path.write_text("another's")
        with pytest.raises(DataError, match="another process has taken over"):
            held.check()
    assert path.read_text() == "another's", "what another holds is not removed"
