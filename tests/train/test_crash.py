"""What is kept when a job is asked to stop, or killed: the run goes on with the bits it would have had."""

import os
import signal

import pytest
from jobs import STEPS, TARGET, family, kill, packed, pictured, wait_for

from plait.errors import Stopped


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A run over text on two pipeline stages, trained in one piece."""
    place = packed(tmp_path_factory.mktemp("texts"), pipeline_model_parallel_size=2)
    place.train()
    assert [row["iteration"] for row in place.rows()] == list(range(1, STEPS + 1))
    return place


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A run over pictures on two copies, read by a worker each, trained in one piece."""
    place = pictured(tmp_path_factory.mktemp("pictures"), data_parallel_size=2, num_workers=1)
    place.train()
    return place


def rows_are(place, count):
    return lambda: len(place.rows()) >= count


def interrupted(place, number=signal.SIGUSR2, *, everybody=False):
    """Begin, ask to stop in the middle, and return what was said."""
    process = place.begin()
    wait_for(rows_are(place, 5), process)
    (os.killpg if everybody else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == Stopped.status, said
    return said


def test_who_is_asked_to_stop_keeps_all_it_did_and_goes_on(texts, tmp_path):
    place = texts.copy(tmp_path)

    said = interrupted(place, signal.SIGTERM)

    (state,) = place.states
    done = len(place.rows())
    assert 5 <= done < STEPS
    assert state == f"iter_{done:07d}"  # every iteration that was told
    assert f"its state is kept in data/ckpts/r/.state/{state}" in said
    assert "Traceback" not in said
    assert not (place.root / TARGET).exists()
    assert not (place.ckpts / "latest_checkpointed_iteration.txt").exists()

    assert f"{state}: training goes on from it" in place.train()

    assert place.result() == texts.result()
    assert not (place.ckpts / ".state").exists()


@pytest.mark.long
def test_pictures_go_on_too_when_every_process_is_signalled(pictures, tmp_path):
    place = pictures.copy(tmp_path)
    interrupted(place, signal.SIGTERM, everybody=True)
    assert len(place.states) == 1
    place.train()
    assert place.result() == pictures.result()


def killed_while_saving(place):
    """Kill every process of the job inside a save; the save may be the quicker, then once more."""
    for _ in range(5):
        process = place.begin(non_persistent_save_interval=2)
        wait_for(lambda: len(place.states) == 2, process)
        pids = family(process.pid)
        wait_for(lambda: list((place.ckpts / ".state").glob(".iter_*.part")), process, pause=0.0)
        kill(pids)
        process.communicate()
        if list((place.ckpts / ".state").glob(".iter_*.part")):
            return
    pytest.fail("no kill met a save")


@pytest.mark.parametrize("kind", ["texts", pytest.param("pictures", marks=pytest.mark.long)])
def test_killed_inside_a_save_it_goes_on_from_the_newest_whole_state(kind, request, tmp_path):
    whole = request.getfixturevalue(kind)
    place = whole.copy(tmp_path)
    killed_while_saving(place)
    older, newest = place.states
    damaged = max((place.ckpts / ".state" / newest).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    said = place.train(non_persistent_save_interval=5)

    assert f"{newest} is left aside: it is damaged: " in said
    assert damaged.name in said
    assert f"{older}: training goes on from it" in said
    assert place.result() == whole.result()
    assert not (place.ckpts / ".state").exists()
    assert not list(place.ckpts.glob(".*"))


@pytest.mark.long
def test_a_state_that_does_not_fit_is_named_and_not_used(texts, tmp_path):
    place = texts.copy(tmp_path)
    interrupted(place)
    place.settings = place.settings | {"lr": 2e-2}
    said = place.train()
    assert "is left aside: lr was 0.01 when it was saved and is 0.02 now" in said
    assert [row["iteration"] for row in place.rows()] == list(range(1, STEPS + 1))
    assert place.result()[0] != texts.result()[0]
