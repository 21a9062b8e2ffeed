import subprocess
import sys

import pytest

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
