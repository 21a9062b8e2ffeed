import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest

from plait.cli import main

STAGE = """
import atexit, threading, time
from plait.cli import main

def slow():
    time.sleep(0.2)
    print("thread")

def stage():
    atexit.register(print, "handler")
    threading.Thread(target=slow).start()
    print("stage")
    {ending}

main.main = stage
main.run()
"""


@pytest.mark.parametrize(
    ("ending", "status", "last"),
    [
        ("return 0", 0, ""),
        ("return 75", 75, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise RuntimeError('a mistake of ours')", 1, "RuntimeError: a mistake of ours"),
    ],
)
def test_the_command_ends_with_its_status_once_threads_and_exit_handlers_are_done(ending, status, last):
    found = subprocess.run(
        [sys.executable, "-c", STAGE.format(ending=ending)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == status
    assert found.stdout.split() == ["stage", "thread", "handler"]
    assert found.stderr.strip().endswith(last)


def test_a_full_disk_of_databases_is_told_in_a_sentence(monkeypatch, capsys):
    def stage(_):
        database = sqlite3.connect("")
        database.execute("pragma max_page_count = 2")
        database.execute("create table one (text)")
        database.execute("insert into one values (?)", ("x" * 10_000,))

    monkeypatch.setattr(
        main, "parser", lambda _: SimpleNamespace(parse_args=lambda _: SimpleNamespace(run=stage))
    )
    assert main.main(["x"]) == 2
    assert "database or disk is full\nhint:  look at the disk of temporary files" in capsys.readouterr().err
