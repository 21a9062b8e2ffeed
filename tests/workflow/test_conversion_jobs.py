"""A model that several jobs convert: the same files, and another number of jobs remakes nothing."""

import os

import pytest
from projects import Project, contents

from plait import files

WHOLE, CUT = "data/models/raw/small-megatron", "data/models/sharded/small-megatron-tp2-pp1"
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}

pytestmark = pytest.mark.long


def jobs(number):
    model = {"source": "Mistral-tiny", "conversion_jobs": number}
    return {"raw_hf": {"Mistral-tiny": SMALL}, "models": {"small": model}}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """One whose model three jobs converted and cut."""
    made = Project.make(tmp_path_factory.mktemp("split") / "project")
    done = made.run(CUT, config=jobs(3))
    assert done.rules | {"convert_part": 3, "shard_part": 3, "convert": 1, "shard": 1} == done.rules
    return made


@pytest.fixture
def copy(project, tmp_path):
    return project.copy(tmp_path / "copy")


def models(project):
    """The files of both models, by their path in the project; not what Snakemake leaves there."""
    found = contents(project.folder / "data/models/raw") | contents(project.folder / "data/models/sharded")
    return {
        os.path.relpath(path, project.folder): digest
        for path, digest in found.items()
        if not path.endswith(".snakemake_timestamp")
    }


def test_three_jobs_make_what_one_makes_and_leave_nothing(project, tmp_path):
    alone = Project.make(tmp_path / "alone")
    alone.run(CUT, config=jobs(1))

    assert models(project) == models(alone)
    assert len(models(alone)) > 6
    assert alone.plan(CUT, config=jobs(3)).nothing  # and what one job made is not made again by three


@pytest.mark.parametrize("number", [1, 2, 3])
def test_another_number_of_jobs_remakes_nothing(number, project):
    assert project.plan(CUT, config=jobs(number)).nothing


def test_what_is_made_again_is_made_by_as_many_jobs_as_config_has_now(copy):
    files.remove(copy.folder / CUT)

    assert copy.plan(CUT, config=jobs(2)).rules == {"shard_part": 2, "shard": 1}


def test_a_damaged_source_leaves_no_model_and_all_parts_are_asked_again(copy):
    files.remove(copy.folder / CUT)
    (weights,) = (copy.folder / WHOLE).rglob("*.pt")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-30_000] + bytes([whole[-30_000] ^ 1]) + whole[-29_999:])

    done = copy.snakemake("--cores", "2", CUT, config=jobs(2))

    assert done.code == 1
    assert f"{WHOLE} is not what it was when it was made" in done.text
    assert not (copy.folder / CUT).exists()
    assert copy.plan(CUT, config=jobs(2)).rules == {"shard_part": 2, "shard": 1}
    weights.write_bytes(whole)
    copy.run(CUT, config=jobs(2))
    files.check_manifest(copy.folder / CUT)


def test_a_part_that_failed_is_asked_again_and_no_other(copy):
    files.remove(copy.folder / CUT)
    staging = copy.folder / "data/models/sharded/.small-megatron-tp2-pp1.parts"
    copy.run(*(f"{staging.relative_to(copy.folder)}/{part}-of-3.json" for part in (1, 3)), config=jobs(3))
    assert len(list(staging.glob("*.json"))) == 2

    plan = copy.plan(CUT, config=jobs(3))

    assert plan.rules == {"shard_part": 1, "shard": 1}
    copy.run(CUT, config=jobs(3))
    files.check_manifest(copy.folder / CUT)
    assert not staging.exists()
