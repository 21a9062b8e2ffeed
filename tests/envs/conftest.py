import shutil
import tempfile
from pathlib import Path

import pytest
from envs.containers import TOOLS, bring_up, environment, passthrough


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
