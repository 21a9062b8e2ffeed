import os

os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked from the test's process
os.environ["HF_HUB_OFFLINE"] = "1"

import logging
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("plait", deadline=None)  # a shared machine's clock proves nothing
settings.load_profile("plait")

SLOW = ("workflow", "train", "verify", "fetch", "cli", "convert")
"""Folders whose files are begun first, so that no process is left with a long one at the end."""


def pytest_collection_modifyitems(items):
    def place(item):
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return SLOW.index(folder) if folder in SLOW else len(SLOW)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _as_loud_as_before():
    """A command that is called in the test's process may quieten what later tests listen to."""
    logger = logging.getLogger("plait")
    level = logger.level
    yield
    logger.setLevel(level)
