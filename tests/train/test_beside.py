"""A save that is written beside training is the save of that moment, whole or not there at all."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from jobs import STEPS, TARGET, family, kill, packed, wait_for
from makers import Maker
from test_loop import RUN

from plait import files
from plait.errors import CheckpointError
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.processes import started
from plait.verify.ranks import run_ranks

MODULE = "plait.train.scribe"


def trained(shards, keys):
    """A state with moments, and what a checkpoint of it says."""
    from plait.convert import checkpoint
    from plait.train.build import DTYPES, build_model, load_weights, optimizer_of, schedule_of, wrap
    from plait.train.state import TrainState
    from plait.train.writer import Origin

    run, spec = RUN | keys, Spec.of(shards, HF_CONFIG)
    inner = build_model(spec, Grid(), dtype=DTYPES[keys["params_dtype"]], run=run)
    load_weights(inner, checkpoint.read_rank(shards, Grid(), 0, 0))
    optimizer = optimizer_of(wrap([inner], run), run)
    state = TrainState([inner], optimizer, schedule_of(optimizer, run, train_iters=9, sequence=24))
    step(state)
    return state, Origin(shards, spec, Grid(), run, {}, "")


def step(state):
    for parameter in state.model[0].parameters():
        parameter.main_grad.copy_(torch.randn_like(parameter, dtype=torch.float32))
    state.optimizer.step()
    state.iteration += 1


def said(work, *arguments):
    with pytest.raises(CheckpointError) as caught:
        work(*arguments)
    return str(caught.value)


def scenes(shards, keys, folder):
    """Saves of one process, each followed by steps that change all that it saved."""
    from plait.train.saves import Saves

    state, origin = trained(shards, keys)
    told = {}

    def save(saves, name, *, goes_on):
        saves.save(state, folder / name, origin, {"place.json": {"at": state.iteration}}, goes_on=goes_on)

    with Saves(beside=True) as saves:
        for number in (1, 2):
            save(Saves(), f"at once {number}", goes_on=False)
            save(saves, f"beside {number}", goes_on=True)
            step(state)
        told["one at a time"] = (folder / "beside 1").is_dir()
        saves.settle()
        writer = saves._beside._process.pid
        old = resource.prlimit(writer, resource.RLIMIT_FSIZE)
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (20_000, old[1]))
        save(saves, "full", goes_on=True)
        told["full"] = said(saves.settle)
        resource.prlimit(writer, resource.RLIMIT_FSIZE, old)
        os.kill(writer, signal.SIGSTOP)
        save(saves, "killed", goes_on=True)
        told["not yet"] = saves.look()
        os.kill(writer, signal.SIGKILL)
        while not saves.look():
            time.sleep(0.01)
        told["killed"] = said(saves.settle)
    return told


def fails_after(shards, keys, folder, patience):
    """Training fails when a save has begun."""
    from plait.train import saves as module

    module.GRACE = patience
    state, origin = trained(shards, keys)
    saves = module.Saves(beside=True)

    def train():
        with saves:
            saves.save(state, folder / "rescued", origin, goes_on=True)
            if not patience:
                os.kill(saves._beside._process.pid, signal.SIGSTOP)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    return saves._beside._process.poll()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    maker = Maker(tmp_path_factory.mktemp("made"))
    return maker.shards(maker.hf(), 1, 1)


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp32", marks=pytest.mark.long)])
def played(request, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    (told,) = run_ranks(scenes, Grid(), shards, {"params_dtype": request.param}, folder)
    return folder, told


@pytest.mark.parametrize("number", [1, 2])
def test_it_holds_what_was_there_when_it_began(played, number):
    folder, told = played
    here, beside = (files.check_manifest(folder / f"{how} {number}") for how in ("at once", "beside"))
    assert here == beside
    assert here["files"].keys() >= {"__0_0.distcp", "optimizer__0_0.distcp", ".metadata", "place.json"}
    assert told["one at a time"]


def test_the_second_is_another(played):
    folder, _ = played
    first, second = (files.read_manifest(folder / f"beside {number}")["files"] for number in (1, 2))
    assert {name for name in first if first[name] != second[name]} >= {
        "__0_0.distcp", "optimizer__0_0.distcp", "place.json", "common.pt",
    }  # fmt: skip


def test_a_full_disk_is_told_with_the_path(played):
    folder, told = played
    assert told["full"].startswith(f"{folder}/full could not be written: File too large\nhint:")
    assert not (folder / "full").exists()


def test_a_writer_that_is_killed_is_told_with_the_path(played):
    folder, told = played
    assert told["not yet"] is False
    assert told["killed"].startswith(
        f"{folder}/killed could not be written: the process that wrote it ended with status -9"
    )
    assert not (folder / "killed").exists()


@pytest.mark.long
@pytest.mark.parametrize("patience", [20.0, 0.0])
def test_what_is_being_written_is_waited_for_when_training_fails(patience, shards, tmp_path):
    (status,) = run_ranks(fails_after, Grid(), shards, {"params_dtype": "fp32"}, tmp_path, patience)
    assert status == -signal.SIGKILL
    assert (tmp_path / "rescued").exists() == bool(patience)
    if patience:
        files.check_manifest(tmp_path / "rescued")


# Whole jobs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two copies, trained in one piece without a save before its end."""
    place = packed(tmp_path_factory.mktemp("whole"), data_parallel_size=2)
    place.train()
    return place


def writers(pid):
    """The processes of a job that write beside training, by their ranks' numbers."""
    found = [one for one in family(pid) if MODULE in Path(f"/proc/{one}/cmdline").read_text().split("\0")]
    rank_of = {one: rank(one) for one in found}
    return sorted(rank_of, key=rank_of.get)


def rank(pid):
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return int(next(word for word in words if word.startswith("RANK=")).removeprefix("RANK="))


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("beside", [True, False])
def test_saves_change_nothing_of_what_is_trained(whole, every, beside, tmp_path):
    place = whole.copy(tmp_path)
    place.train(non_persistent_save_interval=every, async_save=beside)
    assert place.result() == whole.result()
    assert not [*place.ckpts.glob(".*")]


@pytest.mark.long
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fault", ["full", "killed"])
def test_a_job_whose_writer_fails_ends_in_a_sentence_and_goes_on_from_the_save_before(
    whole, which, fault, tmp_path
):
    place = whole.copy(tmp_path)
    process = place.begin(non_persistent_save_interval=3)
    wait_for(lambda: place.states, process)
    writer = writers(process.pid)[which]
    if fault == "killed":
        os.kill(writer, signal.SIGKILL)
    else:
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    told, _ = process.communicate(timeout=120)

    assert process.returncode == 2
    why = {"killed": "the process that wrote it ended with status -9", "full": "File too large"}[fault]
    assert (
        f"error: data/ckpts/r/.state/iter_{int(place.states[-1][5:]) + 3:07d} could not be written: {why}"
        in told
    )
    assert "plait/train/rank.py" not in told  # torchrun alone says where it stood
    kept = place.states[-1]
    assert f"{kept}: training goes on from it" in place.train()
    assert place.result() == whole.result()
    assert not [*place.ckpts.glob(".*")]


@pytest.mark.long
@pytest.mark.parametrize("victim", ["writers", "ranks"])
def test_a_job_that_is_killed_while_its_writers_write_goes_on_from_the_save_before(whole, victim, tmp_path):
    place = whole.copy(tmp_path)
    process = place.begin(non_persistent_save_interval=4)
    wait_for(lambda: place.states, process)
    found, everybody = writers(process.pid), family(process.pid)
    for one in found:
        os.kill(one, signal.SIGSTOP)
    parts = place.ckpts / ".state"
    wait_for(lambda: [*parts.glob(".iter_*.part")], process, pause=0.0)
    time.sleep(0.5)
    kill(everybody if victim == "ranks" else found)
    process.communicate(timeout=120)
    assert [*parts.glob(".iter_*.part")]
    for one in found:
        assert not started(one)
    assert "training goes on from it" in place.train()
    assert place.result() == whole.result()
    assert not [*place.ckpts.glob(".*")]


@pytest.mark.long
def test_a_job_that_is_asked_to_stop_waits_for_what_is_being_written(whole, tmp_path):
    place = whole.copy(tmp_path)
    process = place.begin(non_persistent_save_interval=4)
    wait_for(lambda: place.states, process)
    for one in writers(process.pid):
        os.kill(one, signal.SIGSTOP)
    wait_for(lambda: [*(place.ckpts / ".state").glob(".iter_*.part")], process, pause=0.0)
    stopped = writers(process.pid)
    process.send_signal(signal.SIGUSR2)
    time.sleep(1)
    assert process.poll() is None
    for one in stopped:
        os.kill(one, signal.SIGCONT)
    process.communicate(timeout=120)
    assert len(place.states) == 2
    place.train()
    assert place.result() == whole.result()


@pytest.mark.long
def test_checkpoints_that_wait_are_put_into_place_by_later_jobs(whole, tmp_path):
    place = whole.copy(tmp_path, every=STEPS // 3)
    for number in (1, 2, 3):
        before, step = (number - 1) * STEPS // 3, number * STEPS // 3
        place.train(after=before, to=step, asked={"until": STEPS}, saves_per_job=3)
    assert place.result() == whole.result()
    assert (place.root / TARGET).is_dir()
    shutil.rmtree(place.root / TARGET)
