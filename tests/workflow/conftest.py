import os
import shutil
import subprocess
import sys

import pytest
import yaml
from projects import Project


@pytest.fixture
def project(tmp_path):
    return Project.make(tmp_path / "project")


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory):
    """A project that nothing was made in; dry runs only."""
    return Project.make(tmp_path_factory.mktemp("empty") / "project")


@pytest.fixture(scope="session")
def maker(tmp_path_factory):
    """Model folders; only the tests that ask for it load torch."""
    from makers import Maker

    return Maker(tmp_path_factory.mktemp("models"))


@pytest.fixture
def adopt(project):
    """Runs ``plait adopt`` in the project; its status and words."""

    def run(*paths, config, command="adopt"):
        project.write("overlay.yaml", yaml.safe_dump(config))
        words = ["--config", "config/config.yaml", "overlay.yaml"] if command == "adopt" else []
        done = subprocess.run(
            [sys.executable, "-m", "plait.cli.main", command, *paths, *words],
            cwd=project.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def put(project):
    """Copies files that plait made, without its manifest, to where it would write them."""

    def copy(source, target, *, leave=()):
        target = project.folder / target
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("plait.json", *leave), symlinks=False)
        return target

    return copy
