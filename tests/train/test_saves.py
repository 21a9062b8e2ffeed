"""One job writes several checkpoints, and later ones thin out those before: the bits stay what they were."""

import random
import signal
from pathlib import Path

import pytest
from jobs import STEPS, family, kill, packed, pictured, saved, wait_for

from plait import files, layout
from plait.errors import LayoutError
from plait.train.job import Job
from plait.train.kept import Kept

EVERY = 8
WEIGHTS, OPTIMIZER = "__0_0.distcp", "optimizer__0_0.distcp"
THINNED = {"keep": "last 1", "save_optim": "last", "saves_per_job": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run trained in one piece."""
    place = packed(tmp_path_factory.mktemp("whole"))
    place.train()
    return place


def names(place, step):
    return {path.name for path in (place.root / saved(step)).iterdir()}


def test_a_job_of_several_checkpoints_is_killed_goes_on_and_is_the_run_in_one_piece(whole, tmp_path):
    place = whole.copy(tmp_path, every=EVERY)
    asked = {"until": STEPS, "wanted": [EVERY]}
    process = place.begin(to=EVERY, asked=asked, **THINNED)
    wait_for((place.ckpts / f".saved/iter_{EVERY:07d}").exists, process)
    kill(family(process.pid))
    process.communicate()
    assert not (place.root / saved(EVERY)).exists()

    said = place.train(to=EVERY, asked=asked, **THINNED)

    assert f".saved/iter_{EVERY:07d}: training goes on from it" in said
    assert [path.name for path in sorted(place.ckpts.glob("iter_*"))] == [f"iter_{EVERY:07d}"]
    for step in (2 * EVERY, STEPS):
        said = place.train(after=step - EVERY, to=step, asked=asked, **THINNED)
        assert f"{saved(step)} was saved by a job before: it is moved into place" in said
        assert "lm loss" not in said
    assert place.result() == whole.result()
    assert not list(place.ckpts.glob(".*"))
    assert (place.ckpts / layout.TRACKER).read_text() == str(STEPS)
    # The first is wanted, the second is what the last job started from: all of that stays.
    assert [names(place, step) & {WEIGHTS, OPTIMIZER} for step in (EVERY, 2 * EVERY, STEPS)] == [
        {WEIGHTS}, {WEIGHTS, OPTIMIZER}, {WEIGHTS, OPTIMIZER},
    ]  # fmt: skip
    assert {WEIGHTS, OPTIMIZER} <= files.check_manifest(place.root / saved(EVERY))["files"].keys()
    refused = place.train(code=2, after=EVERY, to=2 * EVERY, **THINNED)
    assert f"{saved(EVERY)} has no optimizer any more: save_optim: last removed it" in refused
    # Nothing waits for the first any more, and the run is at its end.
    place.train(after=2 * EVERY, to=STEPS, **THINNED | {"save_optim": "none"})
    assert [names(place, step) & {WEIGHTS, OPTIMIZER} for step in (EVERY, 2 * EVERY, STEPS)] == [
        set(), {WEIGHTS, OPTIMIZER}, {WEIGHTS},
    ]  # fmt: skip


@pytest.mark.long
def test_what_waits_for_a_run_of_another_length_is_not_taken(whole, tmp_path):
    """Learning rates follow the length, which no setting has where epochs give it."""
    place = whole.copy(tmp_path, every=EVERY)
    process = place.begin(to=EVERY, asked={"until": STEPS}, async_save=False)
    wait_for((place.ckpts / f".saved/iter_{EVERY:07d}").exists, process)
    kill(family(process.pid))
    process.communicate()
    schedule = place.ckpts / "schedule.json"
    schedule.write_text(
        schedule.read_text().replace(f'"train_iters": {STEPS}', f'"train_iters": {2 * STEPS}')
    )

    said = place.train(to=EVERY)

    assert f".saved/iter_{EVERY:07d} is left aside: data/ckpts/r/schedule.json was" in said


def test_what_has_come_to_stand_at_the_target_meanwhile_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_json("data/ckpts/r/schedule.json", {"train_iters": EVERY, "save_interval": EVERY})
    start = "data/models/sharded/m-megatron-tp1-pp1"
    job = Job(start, "data/analysis/x", "data/ckpts/r/schedule.json", saved(EVERY), {"finetune": True})
    waits, mine = Path(f"data/ckpts/r/.saved/iter_{EVERY:07d}"), Path(saved(EVERY), "mine.txt")
    for folder in (waits, mine.parent):
        folder.mkdir(parents=True)
    mine.write_text("kept")

    with pytest.raises(LayoutError, match="plait did not make it"):
        Kept(job).publish()

    assert mine.read_text() == "kept"
    assert waits.is_dir()


def test_a_damaged_checkpoint_is_named_and_nothing_is_trained_from_it(whole, tmp_path):
    place = whole.copy(tmp_path, every=EVERY)
    place.train(to=EVERY)
    damaged = place.root / saved(EVERY) / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    said = place.train(code=2, after=EVERY, to=2 * EVERY)

    assert f"{saved(EVERY)} is damaged: {saved(EVERY)}/__0_0.distcp does not have the sha256" in said
    assert f"or remove {saved(EVERY)}: asked again, it is trained anew" in said
    assert len(place.rows()) == EVERY
    assert not list(place.ckpts.glob(".saved/*"))


LONG = 100
PARTITIONS = {"50 + 50": (50, 1), "10 x 10": (10, 1), "10 x 10, five a job": (10, 5)}


@pytest.fixture(scope="module", params=["texts", "pictures"])
def straight(request, tmp_path_factory):
    """A run of 100 iterations in one piece: of text over two stages, of pictures over two copies."""
    keys = {"train_iters": LONG, "save_interval": LONG}
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "texts":
        place = packed(root, pipeline_model_parallel_size=2, **keys)
    else:
        place = pictured(root, data_parallel_size=2, num_workers=1, **keys)
    place.train(to=LONG)
    return place


def jobs(every, saves):
    """The jobs that Snakemake starts for a run: some train, others move what these have saved."""
    for number, step in enumerate(range(every, LONG + 1, every)):
        until = (number // saves + 1) * saves * every
        yield {"after": step - every, "to": step, "asked": {"until": until}, "saves_per_job": saves}


@pytest.mark.long
@pytest.mark.parametrize("name", PARTITIONS)
def test_every_partition_into_jobs_ends_in_equal_bits(name, straight, tmp_path):
    every, saves = PARTITIONS[name]
    place = straight.copy(tmp_path, every=every)
    for job in jobs(every, saves):
        place.train(**job)
    assert place.result(LONG) == straight.result(LONG)


@pytest.mark.long
def test_checkpoints_have_equal_manifests_however_many_a_job_writes(straight, tmp_path):
    found = []
    for saves in (1, 5):
        place = straight.copy(tmp_path / str(saves), every=20)
        for job in jobs(20, saves):
            place.train(**job)
        paths = [place.root / saved(step) / layout.MANIFEST for step in range(20, LONG + 1, 20)]
        found.append([path.read_bytes() for path in paths])
    assert found[0] == found[1]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_five_random_moments_it_ends_in_equal_bits(seed, straight, tmp_path):
    place = straight.copy(tmp_path, every=10)
    draw = random.Random(seed)
    first, second, third = (draw.randrange(low, low + 20) for low in (6, 36, 66))

    def trained(step):
        return lambda _: len(place.rows()) >= step

    moments = [
        trained(first),
        lambda _: [*place.ckpts.glob(".s*/.iter_*.part")],  # within a save
        trained(second),
        lambda before: len([*place.ckpts.glob(".saved/iter_*")]) > before,  # just renamed
        trained(third),
    ]
    job, *others = jobs(10, 10)
    for moment in moments:
        before = len([*place.ckpts.glob(".saved/iter_*")])
        process = place.begin(**job, non_persistent_save_interval=3)
        wait_for(lambda met=moment, known=before: met(known), process, pause=0.001)
        kill(family(process.pid))
        assert process.wait() == -signal.SIGKILL
        assert not [*place.ckpts.glob("iter_*")]
    for one in (job, *others):
        place.train(**one, non_persistent_save_interval=3)
    assert place.result(LONG) == straight.result(LONG)
