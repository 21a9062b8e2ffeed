"""One writer at a time, also across machines: a file that says who is at work.

It is made by link(2), which is atomic on NFS and Lustre where flock may not be. Its holder touches it while
it lives. Another waits until the file goes; it takes over where the holder is gone: its process on this
machine has ended, or the file was not touched for a minute by the watcher's own clock.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plait.errors import DataError

BEAT, STALE, LOOK = 5.0, 60.0, 0.5

log = logging.getLogger(__name__)


class Claim:
    """A claim that this process holds."""

    def __init__(self, path: Path, text: str) -> None:
        """Begin to touch it."""
        self.path, self.text = path, text
        self._end = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    @property
    def held(self) -> bool:
        """Whether nobody has taken it over, as from a process that was stopped for long."""
        return _read(self.path) == self.text

    def check(self) -> None:
        """Go on only while it is held.

        Raises:
            DataError: another has taken it over.
        """
        if not self.held:
            raise DataError(f"{self.path.parent}: another process has taken over", hint="let it finish")

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            if self.held:
                with suppress(FileNotFoundError):
                    os.utime(self.path)

    def release(self) -> None:
        """Let others go on."""
        self._end.set()
        self._beats.join()
        if self.held:
            self.path.unlink(missing_ok=True)


@contextmanager
def claim(path: Path, what: str) -> Iterator[Claim]:
    """Hold a claim; first wait until nobody else does.

    Args:
        path: the file that says it.
        what: what is claimed, for the line that says who is waited for.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    text = json.dumps({**me, "nonce": uuid.uuid4().hex})
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text(text, encoding="utf-8")
    try:
        _wait_for(path, mine, what)
    finally:
        mine.unlink(missing_ok=True)
    held = Claim(path, text)
    try:
        yield held
    finally:
        held.release()


def _wait_for(path: Path, mine: Path, what: str) -> None:
    seen: tuple[str, int] = ("", 0)
    since = time.monotonic()
    while True:
        with suppress(FileExistsError):
            os.link(mine, path)
            return
        try:
            now = (_read(path), path.stat().st_mtime_ns)
        except FileNotFoundError:
            continue
        if now[0] != seen[0] and now[0]:
            log.info("%s: waiting for %s", what, _who(now[0]))
        if now != seen:
            seen, since = now, time.monotonic()
        if _ended(now[0]) or time.monotonic() - since > STALE:
            log.info("%s: taken over from %s, which is gone", what, _who(now[0]))
            _take_away(path, now[0])
            continue
        time.sleep(LOOK)


def _take_away(path: Path, text: str) -> None:
    """Remove a claim if it still is the one that was looked at; another's new one is put back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside) != text:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _who(text: str) -> str:
    found = _parsed(text)
    return f"process {found.get('pid', '?')} on {found.get('host', '?')}"


def _ended(text: str) -> bool:
    found = _parsed(text)
    if found.get("host") != socket.gethostname():
        return False
    return _started(int(found.get("pid", 0))) != found.get("started")


def _parsed(text: str) -> dict[str, str | int]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _started(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""
