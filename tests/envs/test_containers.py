"""Rules in images, for real: the same artifacts as without, for root and for others, with data/ elsewhere."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from envs.containers import EVERYONES, PACKAGES, ROOT, SEEN, WHERE, environment, passthrough, proofs
from envs.fixtures import EXPORT, PATIENCE, small
from projects import Project

pytestmark = pytest.mark.cluster

APPTAINER = ("--sdm", "apptainer")


def test_the_chat_plan_in_images_gives_the_same_roots_and_images_plan_nothing(
    bare, contained, image, scratch, tmp_path
):
    images = {"io": str(passthrough(scratch / "of-io")), "cpu": str(image), "gpu": str(image)}
    inside = small(Project.make(tmp_path / "project"), images)
    (scratch / "data").mkdir()
    (inside.folder / "data").symlink_to(scratch / "data")

    inside.run(EXPORT, *APPTAINER, timeout=PATIENCE)

    seen = set((inside.folder / SEEN).read_text().split())
    assert seen == {
        "raw", "chat", "tokenizer", "index", "analyse", "build", "convert", "shard", "verify", "schedule",
        "export", "plait.cli.main", "plait.train.node",
    }  # fmt: skip
    where = [line.split() for line in (inside.folder / WHERE).read_text().splitlines()]
    assert {stage for name, stage in where if name == "of-io"} == {"raw", "build", "schedule"}
    assert len(proofs(bare.folder)) > 10
    assert proofs(inside.folder) == proofs(bare.folder)
    assert inside.plan(EXPORT).nothing
    assert inside.plan(EXPORT, *APPTAINER, config={"images": {"cpu": str(image.parent)}}).nothing


def test_an_image_that_is_not_there_is_refused_before_anything_runs(contained, tmp_path):
    project = small(Project.make(tmp_path / "project"))

    said = project.refusal(EXPORT, *APPTAINER)

    assert "images.cpu: envs/cpu.sif does not exist" in said
    assert "make image" in said
    assert project.plan(EXPORT).code == 0


@pytest.mark.parametrize("path", ["x; touch y", "$(touch y)", "a b.sif", "x'y"])
def test_an_image_is_no_shell_text(path, contained, tmp_path):
    project = small(Project.make(tmp_path / "project"), {"cpu": path})

    assert "images.cpu: String should match" in project.refusal(EXPORT, *APPTAINER)


@pytest.fixture
def somebody():
    """A user that has nothing here; removed afterwards."""
    if os.getuid():
        pytest.skip("only root can make a user")
    name = "plait-somebody"
    subprocess.run(["useradd", "--create-home", name], check=True)
    yield pwd.getpwnam(name)
    subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


def test_any_user_runs_rules_in_images_with_data_and_sources_elsewhere(somebody, commands, scratch):
    home = Path(somebody.pw_dir)
    image = passthrough(scratch / "everyones", EVERYONES)
    talk = (
        '{"id": "1", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (home / "talks").mkdir()
    (home / "talks/talk.jsonl").write_text(talk)
    project = small(Project.make(home / "project"), {"io": str(image), "cpu": str(image)})
    config = {"datasets": {"mine": {"source": {"kind": "chat-jsonl", "path": "~/talks"}}}}
    project.write("mine.yaml", yaml.safe_dump(config))
    data = scratch / "somebodys"
    data.mkdir()
    (project.folder / "data").symlink_to(data)
    for path in (home, *home.rglob("*"), data):
        os.chown(path, somebody.pw_uid, somebody.pw_gid, follow_symlinks=False)
    source = ROOT / "src"
    around = environment(commands, EVERYONES) | {"PYTHONPATH": f"{source}:{PACKAGES}"}

    given = [f"{name}={value}" for name, value in (around | {"HOME": str(home)}).items()]
    done = subprocess.run(
        ["runuser", "-u", somebody.pw_name, "--", "env", "-i", *given,
         EVERYONES, "-m", "snakemake", "--cores", "2", *APPTAINER, "--configfile", "mine.yaml", "--",
         "data/processed/mine/shard_00000.jsonl.gz", "data/models/raw/small-megatron/plait.json"],
        cwd=project.folder, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert set((project.folder / SEEN).read_text().split()) == {
        "raw",
        "chat",
        "tokenizer",
        "build",
        "convert",
        "plait.cli.main",
    }
    assert (data / "processed/mine/shard_00000.jsonl.gz").is_file()
    assert (data / "models/raw/small-megatron/plait.json").stat().st_uid == somebody.pw_uid
    assert sorted(path.name for path in project.folder.iterdir() if path.name.startswith(".")) == [
        ".snakemake"
    ]


SAID = """\
echo "token $HF_TOKEN, in $PWD, python $(command -v python)"
cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'hf_of_[s]omebody'
exit
"""


def test_a_shell_in_an_image_has_the_tokens_and_no_command_line_has_them(
    contained, image, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    project = small(Project.make(tmp_path / "project"), {"gpu": str(image)})

    done = subprocess.run(
        [sys.executable, "-m", "plait.cli.main", "shell", "--apptainer"],
        cwd=project.folder, input=SAID, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip

    assert done.stdout.splitlines()[-2:] == [
        f"token hf_of_somebody, in {project.folder}, python /image/bin/python", "0",
    ], done.stderr  # fmt: skip
