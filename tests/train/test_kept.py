"""A job is killed while it publishes, before each change that it makes of a file: nothing is lost."""

import itertools
import os
import shutil
import signal
from contextlib import chdir
from pathlib import Path

import pytest
from projects import contents

from plait import files, layout
from plait.train.job import Job
from plait.train.kept import Kept

CHANGES = ("link", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink")
SETTINGS = {"finetune": True}
START, ANALYSIS, SCHEDULE = (
    "data/models/sharded/m-megatron-tp1-pp1",
    "data/analysis/x",
    "data/ckpts/r/schedule.json",
)
LENGTH, EVERY = 16, 8
RUN = Path("data/ckpts/r")


def iteration(step):
    return str(layout.Iteration(run="r", iteration=step))


def job(step, start=START):
    """The job of a checkpoint, which saved all others as well."""
    asked = {"until": LENGTH, "wanted": [], "resumed": []}
    around = {"save_optim": "none", "keep": "all", "saves_per_job": 9}
    return Job(start, ANALYSIS, SCHEDULE, iteration(step), SETTINGS, around, asked)


def artifact(folder, kind, inputs=()):
    folder = Path(folder)
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "optimizer__0_0.distcp", layout.TRAINED_WITH):
        (folder / name).write_text(f"{name} of {folder}")
    (folder / "carried.safetensors").symlink_to(layout.TRAINED_WITH)
    facts = {"train_iters": LENGTH} if kind == "state" else {}
    files.write_manifest(folder, kind=kind, settings=SETTINGS, inputs=inputs, facts=facts)


def waiting(root):
    """A folder in which two checkpoints wait for their jobs, beside a state against a crash."""
    root.mkdir()
    with chdir(root):
        files.write_json(SCHEDULE, {"train_iters": LENGTH, "save_interval": EVERY})
        artifact(START, "sharded")
        artifact(ANALYSIS, "analysis")
        kept = Kept(job(EVERY))
        for step in (4, EVERY, LENGTH):
            artifact(kept.path(step), "iteration" if step in kept.saves else "state", kept.inputs(step))
        artifact(iteration(EVERY), "iteration")  # of an older config: its job makes it anew
    return root


def dies(what, number):
    """Do something in a process that is killed before its nth change of a file; whether it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        counted = itertools.count(1)
        for name in CHANGES:
            setattr(os, name, _deadly(getattr(os, name), counted, number))
        what()
    finally:
        os._exit(0)


def _deadly(change, counted, number):
    def changes(*args, **more):
        if next(counted) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*args, **more)

    return changes


def published(job):
    """What the job does where all that it is asked for waits."""
    kept = Kept(job)
    assert kept.is_done()
    kept.publish()


def test_killed_before_any_change_of_a_file_the_same_job_publishes_what_was_saved(tmp_path):
    before = contents(waiting(tmp_path / "0"))
    weights = {Path(name).name: digest for name, digest in before.items() if ".saved/iter_0000008/" in name}
    for number in range(1, 100):
        root = shutil.copytree(tmp_path / "0", tmp_path / str(number), symlinks=True)
        with chdir(root):
            died = dies(Kept(job(EVERY)).publish, number)
            target = Path(iteration(EVERY))
            if Kept(job(EVERY)).path(EVERY).exists():
                assert died
                (target / layout.MANIFEST).unlink(missing_ok=True)  # as Snakemake does
                published(job(EVERY))
            files.check_manifest(target)
            assert {path.name: files.digest(path) for path in target.iterdir()} == weights
            assert (RUN / layout.TRACKER).read_text() == str(EVERY)
            published(job(LENGTH, iteration(EVERY)))
            files.check_manifest(iteration(LENGTH))
            assert files.pruned(iteration(LENGTH)).keys() == {"optimizer__0_0.distcp"}
            # What is half written and has its process in its name, `plait status --clean` removes.
            left = {path.name for path in RUN.glob(".*")}
            assert {name for name in left if not files.PART.fullmatch(name)} == set()
            assert sorted(path.name for path in RUN.glob("iter_*")) == ["iter_0000008", "iter_0000016"]
        if not died:
            break
    assert number > 20


def test_a_link_stays_a_link_and_files_have_one_name_in_the_end(tmp_path):
    with chdir(waiting(tmp_path / "0")):
        Kept(job(EVERY)).publish()
        found = {path.name: path.lstat().st_nlink for path in Path(iteration(EVERY)).iterdir()}
        assert set(found.values()) == {1}
        assert Path(iteration(EVERY), "carried.safetensors").is_symlink()


@pytest.mark.parametrize("step", [EVERY, LENGTH])
def test_what_an_iteration_is_made_from_is_the_one_before_it(step, tmp_path):
    with chdir(waiting(tmp_path / "0")):
        expected = {START} if step == EVERY else {iteration(EVERY)}
        assert Kept(job(EVERY)).inputs(step).keys() == {ANALYSIS, SCHEDULE} | expected


def test_killed_while_it_removes_old_states_a_job_leaves_whole_ones_and_the_next_goes_on(tmp_path):
    waiting(tmp_path / "0")
    with chdir(tmp_path / "0"):
        for step in (5, 6, 7):
            artifact(Kept(job(EVERY)).path(step), "state")
    for number in range(1, 100):
        with chdir(shutil.copytree(tmp_path / "0", tmp_path / str(number), symlinks=True)):
            kept = Kept(job(EVERY))
            died = dies(kept.prune, number)
            for state in kept.folder.glob("iter_*"):
                files.check_manifest(state)
            kept.prune()
            assert sorted(path.name for path in kept.folder.glob("iter_*")) == [
                "iter_0000006",
                "iter_0000007",
            ]
        if not died:
            break
    assert number > 10
