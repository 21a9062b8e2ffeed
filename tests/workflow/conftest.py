import pytest
from projects import Project


@pytest.fixture
def project(tmp_path):
    return Project.make(tmp_path / "project")


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory):
    """A project that nothing was made in; dry runs only."""
    return Project.make(tmp_path_factory.mktemp("empty") / "project")
