"""Paths that the config names: anywhere on this machine, `~` included."""

import os
import re
from pathlib import Path, PurePosixPath

from plait.errors import ConfigError

SPLIT = ".nv-meta/split.yaml"
"""Where energon keeps which shards are whose."""
DEFAULT_PLAN, PLANS = "config/config.yaml", "config/plans"
HOME = "PLAIT_HOME"
"""Where this is set it is the user's home folder: Snakemake gives images the working folder as HOME."""
JSONL = re.compile(r".*\.jsonl(\.gz|\.lz4|\.zst)?")
"""Names of files of chat records."""
RECORDS = re.compile(r".*\.(jsonl?(\.gz|\.lz4|\.zst)?|parquet)")
"""Names of files whose records a shape reads."""
NAMES = {
    "files": re.compile(RECORDS.pattern + r"|.*\.(tar|zip)"),
    "chat-jsonl": JSONL,
    "llava-json": re.compile(r".*\.json"),
    "tars": re.compile(r".*\.tar"),
    "energon": re.compile(r".*\.tar|dataset\.yaml|split\.yaml|\.info\.(yaml|json)"),
}
"""Names of the files that a source of a kind reads, where it names a path of the user's."""


def local(path: str) -> Path:
    """The path of a file or folder that the config names; `~` is the home folder.

    Raises:
        ConfigError: it starts with `~NAME`, and nobody has that name.
    """
    if HOME in os.environ and Path(path).parts[:1] == ("~",):
        return Path(os.environ[HOME], *Path(path).parts[1:])
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such home folder", hint="write the path in full") from error


def plan_file(name: str | None) -> str:
    """The config file of a plan by name; without a name, that of the default plan.

    Raises:
        ConfigError: there is no plan of that name.
    """
    if name is None:
        return DEFAULT_PLAN
    found = Path(PLANS) / f"{name}.yaml"
    if not found.is_file():
        known = sorted(path.stem for path in Path(PLANS).glob("*.yaml"))
        raise ConfigError(
            f"there is no plan {str(name)!r} in {PLANS}", hint=f"known: {', '.join(known) or 'none'}"
        )
    return str(found)


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


def shard_name(pattern: str, number: int) -> str:
    """The name of a shard.

    Raises:
        ConfigError: the pattern is no Python format of one number, or does not name tars in the folder.
    """
    try:
        name, other = pattern.format(number), pattern.format(number + 1)
    except (ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"energon.shard_name {pattern!r} is no format of a number: {error}") from error
    path = PurePosixPath(name)
    inside = not path.is_absolute() and not any(part.startswith(".") for part in path.parts)
    if name == other or path.suffix != ".tar" or not inside or set("{}[],") & set(name):
        raise ConfigError(
            f"energon.shard_name {pattern!r} must name another .tar, within the folder, for every number",
            hint="e.g. {:06d}.tar or wds/pretrain-{}.tar",
        )
    return name
