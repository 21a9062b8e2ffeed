"""Entries of the lock file: asked of the hub once, added without losing what another job adds."""

import json
import logging
from pathlib import Path
from typing import Any

from plait import files
from plait.config.lock import LOCK, Listed, Lock, Tree
from plait.fetch.claim import claim
from plait.fetch.hub import resolve
from plait.layout import HubTree

log = logging.getLogger(__name__)


def lock_tree(tree: HubTree, *, again: bool = False) -> Tree:
    """The commit and files of a revision: as locked, or else asked and added to the lock.

    Args:
        tree: which.
        again: whether to ask although it is locked.

    Raises:
        DataError: the hub does not have it, or cannot be asked.
    """
    known = Lock().tree(tree)
    found = known if known and not again else resolve(tree)
    _add(tree.key, found)
    files.write_json(str(tree), _plain(found))
    if found != known:
        was = f", was {known.commit[:12]}" if known else ""
        log.info(
            "locked in %s: %s is %s%s, %d files", LOCK, tree.key, found.commit[:12], was, len(found.files)
        )
    return found


def lock_url(url: str, listed: Listed) -> None:
    """Add what the first fetch of a URL gave: config/ has no digest of it."""
    log.warning(
        "locked in %s: %s is sha256 %s. Nobody vouches for this first fetch: compare it with what its "
        "publisher says, and write it into `sha256` in config/",
        LOCK, url, listed.sha256,
    )  # fmt: skip
    _add(url, Listed(bytes=listed.bytes, sha256=listed.sha256))


def _add(key: str, entry: Tree | Listed) -> None:
    path = Path(LOCK)
    with claim(path.with_name(f".{path.name}.claim"), LOCK):
        found = dict(files.read_json(path)) if path.is_file() else {}
        if found.get(key) != _plain(entry):
            files.write_json(path, {**found, key: _plain(entry)})


def _plain(entry: Tree | Listed) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(entry.model_dump_json(exclude_defaults=True))
    return found
