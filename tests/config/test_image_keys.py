"""What images see of a machine: data/ and all that the config names, wherever they lie."""

import os
from pathlib import Path

import pytest

from plait.config.images import BIND, Images, environment
from plait.config.paths import local
from plait.errors import ConfigError


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """A working folder, with a home folder elsewhere."""
    for name in ("work", "home", "scratch", "elsewhere", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path


def binds(named=(), **given):
    found = environment(named, given)[BIND].split(",")
    return {Path(bind).name for bind in found} - {"src"}


def test_the_working_folder_and_the_target_of_data_are_seen(cwd):
    (cwd / "work/data").symlink_to("../scratch")
    (cwd / "scratch/ckpts").symlink_to(cwd / "elsewhere")

    assert binds() == {"work", "scratch", "elsewhere", "tmp"}


def test_paths_of_the_config_are_seen_as_far_as_they_exist_and_lie_elsewhere(cwd):
    (cwd / "home/talks").mkdir()
    (cwd / "work/own").mkdir()
    (cwd / "work/link").symlink_to(cwd / "elsewhere")
    named = {
        "a": [{"path": "~/talks"}, {"path": "own"}],
        "b": "link",
        "c": "/nowhere",
        "d": "Hello",
        "e": 3,
        "f": "/",
    }

    assert binds(named) == {"work", "talks", "elsewhere", "tmp"}


def test_what_lies_in_a_folder_that_is_seen_is_not_named_again(cwd):
    (cwd / "scratch/deep").mkdir()

    assert binds([str(cwd / "scratch/deep"), str(cwd / "scratch")]) == {"work", "scratch", "tmp"}


def test_links_below_a_named_folder_and_deep_in_data_are_seen_where_they_lead(cwd):
    blobs, snapshot = cwd / "scratch/hub/blobs", cwd / "scratch/hub/snapshots/c"
    model, shard, cache = cwd / "elsewhere/M", cwd / "elsewhere/x/1.tar", cwd / "home/cache"
    for folder in (
        blobs,
        snapshot,
        model,
        shard.parent,
        cwd / "work/data/models/raw_hf",
        cwd / "work/data/raw/d",
    ):
        folder.mkdir(parents=True)
    for file in (blobs / "1", shard, cwd / "home/token"):
        file.touch()
    cache.mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (cwd / "work/data/models/raw_hf/M").symlink_to(model)
    (cwd / "work/data/raw/d/1.tar").symlink_to(shard)

    found = binds(str(snapshot), HF_HUB_CACHE=str(cache), HF_TOKEN_PATH=str(cwd / "home/token"))

    assert found == {"work", "tmp", "c", "blobs", "M", "x", "cache", "token"}


def test_binds_that_are_given_stay_and_a_second_time_adds_nothing(cwd):
    first = environment((), {BIND: "/a:/b:ro,/c"})

    assert first[BIND].startswith("/a:/b:ro,/c,")
    assert environment((), first) == first


def test_a_path_that_no_bind_can_say_is_refused(cwd):
    (cwd / "scratch/a,b").mkdir()

    with pytest.raises(ConfigError, match="comma or a colon"):
        environment([str(cwd / "scratch/a,b")])


def test_tokens_and_the_hubs_files_go_along_where_they_are(cwd):
    without = environment((), {})
    assert not [name for name in without if name.endswith(("TOKEN", "KEY"))]
    assert without["APPTAINERENV_HF_HOME"] == str(cwd / "work/.snakemake/cache/huggingface")

    (cwd / "elsewhere/hub").mkdir()
    given = {"HF_TOKEN": "hf_x", "WANDB_API_KEY": "k", "OTHER": "o", "HF_HOME": str(cwd / "elsewhere/hub")}
    found = environment((), given)
    assert found["APPTAINERENV_HF_TOKEN"] == "hf_x"
    assert found["APPTAINERENV_WANDB_API_KEY"] == "k"
    assert found["APPTAINERENV_HF_HOME"] == given["HF_HOME"]
    assert binds(**given) == {"work", "hub", "tmp"}
    assert "o" not in found.values()


def test_home_is_the_users_where_an_image_has_another(cwd, monkeypatch):
    found = environment()["APPTAINERENV_PLAIT_HOME"]
    assert found == os.environ["HOME"] == str(local("~"))

    monkeypatch.setenv("PLAIT_HOME", found)
    monkeypatch.setenv("HOME", "/another")
    assert local("~/x/y") == cwd / "home/x/y"
    assert local("~") == cwd / "home"
    assert local("/x") == Path("/x")
    assert environment()["APPTAINERENV_PLAIT_HOME"] == found


def test_an_image_is_there_or_refused_by_name(cwd):
    (cwd / "home/cpu").mkdir()
    images = Images(cpu="~/cpu")

    assert images.path("cpu") == str(cwd / "home/cpu")
    with pytest.raises(ConfigError, match=r"images\.gpu: envs/gpu\.sif does not exist") as refused:
        images.path("gpu")
    assert "make image" in refused.value.hint
