"""`debug: true`: a session at a real terminal, which leaves nothing."""

import os
import pty
import re
import select
import signal
import termios
import time
from dataclasses import replace

import pytest
from jobs import packed

from plait.config.run import Around
from plait.errors import Stopped
from plait.train.debug import ITERATIONS, alone
from plait.train.job import Job

PROMPT = "(Pdb) "


class Terminal:
    """A process of a command at a terminal of its own."""

    def __init__(self, words, root, env, log=None):
        self.pid, self.end = pty.fork()
        if not self.pid:
            os.chdir(root)
            os.environ |= env
            if log:  # as the workflow does
                file = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(file, 1)
                os.dup2(file, 2)
            os.execvp(words[0], words)
        termios.tcsetwinsize(self.end, (40, 120))
        self.said = ""

    def until(self, text, seconds=120):
        """What it says up to a text, or to its end."""
        began, end = len(self.said), time.monotonic() + seconds
        waiting = select.poll()
        waiting.register(self.end)
        while text is None or text not in self.said[began:]:
            assert time.monotonic() < end, self.said
            if not waiting.poll(500):
                continue
            try:
                part = os.read(self.end, 65536)
            except OSError:
                part = b""
            if not part:
                assert text is None, self.said
                break
            self.said += part.decode()
        return self.said[began:].replace("\r\n", "\n")

    def type(self, line):
        os.write(self.end, f"{line}\n".encode())

    def ask(self, line):
        self.type(line)
        return self.until(PROMPT)

    def ends(self):
        """The rest of what it says, and its status."""
        rest = self.until(None)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return rest, os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal():
    opened = []

    def open_(place, log=None, env=None, **around):
        opened.append(Terminal(place.words(debug=True, **around), place.root, env or {}, log))
        return opened[-1]

    yield open_
    for one in opened:
        if one.pid:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        os.close(one.end)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of four processes."""
    root = tmp_path_factory.mktemp("debug")
    return packed(root, tensor_model_parallel_size=2, data_parallel_size=2, use_distributed_optimizer=True)


def tree(root):
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*")}


WEIGHTS = "p sum(p.double().abs().sum() for one in self.model for p in one.parameters()).item()"


def number(text):
    return float(re.search(r"\d+\.\d+", text)[0])


def test_a_session_has_one_process_one_sequence_and_a_debugger(place, terminal, tmp_path):
    before, log = tree(place.root), tmp_path / "log"
    session = terminal(place, log=str(log))
    assert "before the first iteration" in session.until(PROMPT)
    assert "(1, 1)" in session.ask("p trainer.feed.micro, trainer.feed.total")
    assert "[1, 1]" in session.ask(
        "p [trainer.feed.dp_size, trainer.model[0].config.tensor_model_parallel_size]"
    )
    assert "Breakpoint 1 at" in session.ask("b trainer._iteration")
    assert "_iteration()" in session.ask("c")
    first = number(session.ask(WEIGHTS))
    session.ask("c")
    session.ask("c")  # the first step of its warmup moves nothing
    assert number(session.ask(WEIGHTS)) != first
    assert "Deleted breakpoint 1" in session.ask("clear 1")
    session.type("c")
    rest, status = session.ends()
    assert "lm loss" in rest
    assert f"{ITERATIONS}/{ITERATIONS}" in rest
    assert "`debug: true`: data/ckpts/r/iter_0000024 was not made, and nothing is kept" in rest
    assert status == Stopped.status
    assert tree(place.root) == before
    (said,) = log.read_text().splitlines()
    assert said.startswith("data of data/analysis/x: ")


FAULTY = """
from plait.train import batches
def part(self, rank, ranks):
    raise ZeroDivisionError("on purpose")
batches.Batch.part = part
"""


@pytest.mark.long
def test_an_error_is_shown_where_it_was_raised(place, terminal, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    session = terminal(place, env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    session.until(PROMPT)
    assert "ZeroDivisionError: on purpose" in session.ask("c")
    assert "ranks = 1" in session.ask("p f'ranks = {ranks}'")
    session.type("q")
    assert session.ends()[1] == 1


@pytest.mark.long
def test_who_quits_leaves_nothing_either(place, terminal):
    before = tree(place.root)
    session = terminal(place)
    session.until(PROMPT)
    session.type("q")
    rest, status = session.ends()
    assert "was not made, and nothing is kept" in rest
    assert status == Stopped.status
    assert tree(place.root) == before


def test_without_a_terminal_nobody_could_type(place):
    process = place.begin(debug=True)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "runs.r has `debug: true`, and standard input is no terminal" in said


def test_a_checkpoint_is_debugged_by_its_weights(place):
    start = "data/ckpts/r/iter_0000008"
    job = Job(start, "a", "s", "data/ckpts/r/iter_0000016", place.settings | {"init": "random"})
    debugged = alone(replace(job, around=Around(debug=True, eval_interval=3).model_dump()))
    assert debugged.settings["start_run"] == "r"
    assert debugged.settings["init"] == "checkpoint"
    assert debugged.settings["use_distributed_optimizer"] is False
    assert debugged.around["eval_interval"] is None
    assert len(debugged.grid) == 1
