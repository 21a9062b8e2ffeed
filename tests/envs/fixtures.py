"""What tests of images share, here and in tests/cluster."""

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from envs.containers import TOOLS, bring_up, environment, passthrough
from projects import Project

CHAT = yaml.safe_load((Path(__file__).parent / "chat.yaml").read_text())
EXPORT = "data/ckpts/small/hf/model_iter_4"
PATIENCE = 1500
"""Seconds for the whole plan: minutes on idle cores, more on shared ones."""


@pytest.fixture(scope="session")
def commands():
    """The folder with a real apptainer."""
    return bring_up()


@pytest.fixture(scope="session")
def scratch(commands):
    """A place that no image sees by itself, as scratch disks are."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=TOOLS, prefix="scratch-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def image(scratch):
    """A sandbox folder: what every user may start, also where /dev/fuse is root's."""
    return passthrough(scratch / "image")


@pytest.fixture
def contained(commands, monkeypatch):
    """The environment in which jobs run in images."""
    for name, value in environment(commands).items():
        monkeypatch.setenv(name, value)


def small(project, images=None, **more):
    """The small chat plan in place of a project's own."""
    project.write("config/config.yaml", yaml.safe_dump({**CHAT, "images": images or {}, **more}))
    return project


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The small chat plan without images, run to the end."""
    project = small(Project.make(tmp_path_factory.mktemp("bare") / "project"))
    project.run(EXPORT, timeout=PATIENCE)
    return project
