"""Paths that the config names: anywhere on this machine, `~` included."""

import re
from pathlib import Path

from plait.errors import ConfigError

JSONL = re.compile(r".*\.jsonl(\.gz|\.lz4|\.zst)?")
"""Names of files of chat records."""
NAMES = {
    "chat-jsonl": JSONL,
    "llava-json": re.compile(r".*\.json"),
    "tars": re.compile(r".*\.tar"),
    "energon": re.compile(r".*\.tar|dataset\.yaml|split\.yaml"),
}
"""Names of the files that a source of a kind reads, where it names a path of the user's."""


def local(path: str) -> Path:
    """The path of a file or folder that the config names; `~` is the home folder.

    Raises:
        ConfigError: it starts with `~NAME`, and nobody has that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such home folder", hint="write the path in full") from error


def check_there(key: str, path: str) -> None:
    """Refuse a path that does not exist.

    Args:
        key: where the config names it.
        path: what it names.

    Raises:
        ConfigError: there is nothing at the path.
    """
    if not local(path).exists():
        raise ConfigError(f"{key}: {path} does not exist", hint="paths are relative to the working folder")
