"""Weights & Biases, told what metrics.jsonl has, where a run names a project. Users install its package.

The key goes by the environment, ``WANDB_API_KEY``, or by .netrc, where W&B itself looks; with
``WANDB_MODE=offline`` it needs none and writes to the run's folder.
"""

import contextlib
import importlib.util
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from uuid import uuid4

from plait.errors import ConfigError

ID = "run-id"
"""One run of W&B for one of plait: segments go on in it."""
QUIET = ("offline", "disabled")


class Silent:
    """Nobody is told."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Told(Silent):
    """A run of W&B."""

    def __init__(self, folder: Path, logged: Mapping[str, Any]) -> None:
        """Begin it, or go on in it."""
        import wandb

        self.run = wandb.init(
            project=logged["wandb_project"],
            entity=logged["wandb_entity"],
            name=logged["wandb_exp_name"] or folder.name,
            tags=[*logged["wandb_tags"]],
            id=_id(folder / "wandb"),
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self.run.define_metric("*", step_metric="iteration")

    def write(self, row: Mapping[str, Any]) -> None:
        """Tell an iteration."""
        self.run.log(dict(row))

    def close(self) -> None:
        """End it; what is still on its way is waited for, also what W&B's own process has still to write."""
        import wandb

        self.run.finish()
        wandb.teardown()


def of(folder: Path, logged: Mapping[str, Any]) -> Silent:
    """Who is told of a run.

    Args:
        folder: the run's.
        logged: its keys of class Logging.
    """
    return Told(folder, logged) if logged["wandb_project"] else Silent()


def check(logged: Mapping[str, Any], *, here: bool) -> None:
    """Refuse to begin what would fail at its first iteration.

    Args:
        logged: a run's keys of class Logging.
        here: whether it trains with the packages of this process, and not with an image's.

    Raises:
        ConfigError: the package is not installed, or there is no key.
    """
    if not logged["wandb_project"]:
        return
    if here and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "wandb_project is set, and the package wandb is not installed", hint="pip install wandb"
        )
    if os.environ.get("WANDB_MODE", "online") in QUIET or os.environ.get("WANDB_API_KEY"):
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host or ""):
            return
    raise ConfigError(
        f"wandb_project is set, and no key for {host} was found",
        hint="set WANDB_API_KEY, or WANDB_MODE=offline",
    )


def _id(folder: Path) -> str:
    """The run's number there, drawn once."""
    path = folder / ID
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")
