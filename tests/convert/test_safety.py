"""What kill -9, a full disk and a read-only place leave: the old artifact or none; the next run works."""

import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from strategies import spec_of
from test_layouts import folder_of
from torch.distributed.checkpoint import filesystem  # noqa: F401 - loaded once, before processes are forked

from plait import files
from plait.cli.main import main

HF, RAW, SHARDED = (
    "data/models/raw_hf/m",
    "data/models/raw/m-megatron",
    "data/models/sharded/m-megatron-tp2-pp1",
)
SETTINGS = ["--settings", json.dumps({"stage": "x", "version": 1})]
COMMANDS = {
    "convert inside data": (["convert", HF, RAW, *SETTINGS], RAW),
    "shard": (["shard", RAW, SHARDED, *SETTINGS], SHARDED),
    "convert to a grid": (["convert", HF, "there/x", "--tp", "2"], "there/x"),
    "convert to torch_dist": (["convert", RAW, "there/x", "--to", "torch_dist"], "there/x"),
    "convert to hf": (["convert", SHARDED, "there/x", "--to", "hf"], "there/x"),
}
CALLS = ("pwrite", "fsync", "replace", "mkdir", "rmdir", "unlink", "truncate")
"""What changes a disk; the moments are before and after each."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with two models, an old and a new one, each as its whole Megatron model and as shards."""
    root = tmp_path_factory.mktemp("safety")
    found = {}
    for name, theta in (("old", 1e4), ("new", 5e5)):
        here = root / name
        (here / "data/models/raw_hf").mkdir(parents=True)
        folder_of(spec_of(rope_theta=theta, vocab_size=300), here / HF, torch.bfloat16)
        (here / HF / "tokenizer.json").write_text("{}")
        files.write_manifest(here / HF, kind="hf_model", settings={})
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            for command in ("convert inside data", "shard"):
                assert main(COMMANDS[command][0]) == 0
        found[name] = here
    return found


@pytest.fixture
def work(models, tmp_path, monkeypatch):
    """A folder with the sources of a command, and its old artifact where a stage of the plan replaces one."""

    def make(target):
        here = tmp_path / "work"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(models["new"], here)
        if target in (RAW, SHARDED):
            shutil.rmtree(here / target)
            shutil.copytree(models["old"] / target, here / target)
        monkeypatch.chdir(here)
        return here

    return make


def content(folder):
    """Every file's bytes; nothing where there is no folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): files.digest(path) for path in paths}


def forked(words, moment, fault):
    """Run the command line in a process of its own, with a fault at a moment; its status and words."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover - it ends by itself
        passed = []
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)

        def wrapped(name, call):
            def run(*given, **keys):
                found = None
                for act in (lambda: None, lambda: call(*given, **keys)):
                    found = act()
                    passed.append(name)
                    if len(passed) == moment:
                        fault()
                return found

            return run

        for name in CALLS:
            call = (
                getattr(os, name) if name != "fsync" else lambda _: None
            )  # a kill loses nothing of the cache
            setattr(os, name, wrapped(name, call))
        status = 70
        try:
            status = main(words)
        finally:
            sys.stderr.write("\n" + " ".join(passed))
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def moments(words):
    """The call at each moment of a command."""
    status, said = forked(words, 0, None)
    assert status == 0, said
    return said.splitlines()[-1].split()


def some(count, first, last):
    """Numbers spread evenly over some, from the first to before the last."""
    return sorted({first + (last - first) * number // count for number in range(count)})


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_job_leaves_the_old_artifact_or_none_or_the_new_one(command, work):
    words, target = COMMANDS[command]
    here = work(target)
    there = (here / target).parent
    old = content(here / target)
    calls = moments(words)
    new = content(here / target)
    found = []

    # The artifact appears by the last rename, and by the one before it where another stood there.
    last = len(calls) - calls[::-1].index("replace")
    for moment in (*some(3, 2, last - 10), *range(last - 10, last + 2), len(calls)):
        here = work(target)
        status, said = forked(words, moment, kill)
        assert status == -signal.SIGKILL, said
        left = content(here / target)
        assert left in (old, {}, new), moment
        found.append("new" if left == new else "old" if left and left == old else "none")
        beside = (
            {path.name for path in there.iterdir()} - {here.joinpath(target).name} if there.is_dir() else ()
        )
        assert all(files.PART.fullmatch(name) for name in beside)
        assert len(beside) <= 2

        if found[-1] != "new" or target in (RAW, SHARDED):
            status, said = forked(words, 0, None)
            assert status == 0, said
            assert all(f"{name} is removed: a process that was killed left it" in said for name in beside)
            assert [path.name for path in there.iterdir()] == [here.joinpath(target).name]
        assert content(here / target) == new

    order = [one for one, _ in itertools.groupby(found)]
    assert order == (["old", "none", "new"] if old else ["none", "new"])


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_is_a_sentence_and_leaves_what_was(command, work):
    words, target = COMMANDS[command]
    here = work(target)
    before = content(here)
    calls = moments(words)
    last = len(calls) - calls[::-1].index("replace")
    writes = [at for at, name in enumerate(calls[: last - 4], 1) if name in ("pwrite", "fsync", "replace")]
    for number, moment in enumerate(writes[at] for at in some(4, 0, len(writes))):
        code = FULL[number % len(FULL)]
        work(target)

        def fault(code=code):
            raise OSError(code, os.strerror(code))

        status, said = forked(words, moment, fault)
        assert status == 2, said
        assert re.search(rf"^error: {target}(/[\w.]+)*: {os.strerror(code)}$", said, re.MULTILINE), said
        assert "Traceback" not in said
        assert content(here) == before


MOUNTED = """
    import os, subprocess, sys
    from plait.cli.main import main
    for size in ("24k", "64k"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "there"], check=True)
        assert main(["convert", sys.argv[1], "there/x", "--tp", "2"]) == 2
        assert not os.listdir("there")
        subprocess.run(["umount", "there"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "there"], check=True)
    assert main(["convert", sys.argv[1], "there/x", "--tp", "2"]) == 2
    assert not os.listdir("there")
"""


def test_a_disk_that_is_really_full_or_read_only(work):
    """Mounted in a namespace of its own, where the machine lets one be made."""
    here = work(HF)
    (here / "there").mkdir()
    own = ["unshare", "--map-root-user", "--mount"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*own, "mount", "-t", "tmpfs", "t", "there"], check=False).returncode
    ):
        pytest.skip("no mounts here")
    ended = subprocess.run(
        [*own, sys.executable, "-c", textwrap.dedent(MOUNTED), HF],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    full, read_only = os.strerror(errno.ENOSPC), os.strerror(errno.EROFS)
    assert errors == [f"error: there/x: {full}"] * 2 + [f"error: there/x: {read_only}"]


def test_what_a_live_process_writes_is_named_and_stays(tmp_path, caplog):
    mine = f".x.{os.getppid()}@{os.uname().nodename}.part"
    other = ".x.7@elsewhere.part"
    for name in (mine, other, ".y.7@elsewhere.part"):
        (tmp_path / name).write_text("half")
    files.write_json(tmp_path / "x", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"x", mine, other, ".y.7@elsewhere.part"}
    said = [record.getMessage() for record in caplog.records]
    assert [sum(name in one for one in said) for name in (mine, other, ".y.")] == [1, 1, 0]
