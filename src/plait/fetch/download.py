"""One file from one address: resumed by whoever comes next, on whatever machine; checked before it appears.

What has come lies in ``.NAME.part`` beside the target; ``.NAME.part.json`` says of what it is a part.
``huggingface_hub`` resumes within one process only and compares no digest.
"""

import hashlib
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any

from plait import files
from plait.config.lock import Listed
from plait.errors import DataError
from plait.fetch.claim import Claim, claim
from plait.fetch.http import Patience, Source, Transient, get, read
from plait.fetch.lfs import MAGIC, is_pointer

CHUNK = 1 << 17
LOOK_EVERY, SAY_EVERY = 1.0, 30.0
PARTIAL, OUT_OF_RANGE = 206, 416
RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")

log = logging.getLogger(__name__)


class Wrong(Exception):  # noqa: N818 - the second one becomes a sentence
    """What came is not what is listed."""


class Digests:
    """The digests of a file whose bytes come one after the other."""

    def __init__(self, size: int | None = None) -> None:
        """Begin; git's sha1 needs to know the size first."""
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.git = hashlib.sha1(b"blob %d\0" % (size or 0), usedforsecurity=False)

    def update(self, content: bytes) -> None:
        """Take the next bytes."""
        self.size += len(content)
        self.sha256.update(content)
        self.git.update(content)

    @property
    def listed(self) -> Listed:
        """What was found, in the words of the lock."""
        return Listed(bytes=self.size, sha256=self.sha256.hexdigest(), git_sha1=self.git.hexdigest())


def digests(path: Path, size: int | None = None) -> Digests:
    """The digests of a file."""
    found = Digests(path.stat().st_size if size is None else size)
    with path.open("rb") as file:
        while content := file.read(CHUNK):
            found.update(content)
    return found


def difference(found: Listed, listed: Listed) -> str:
    """How a file differs from what is listed of it; empty where it does not."""
    if listed.bytes is not None and found.bytes != listed.bytes:
        return f"{found.bytes} bytes, listed are {listed.bytes}"
    for name in ("sha256", "git_sha1"):
        here, there = getattr(found, name), getattr(listed, name)
        if there and here != there:
            return f"{name} {here[:12]}, listed is {there[:12]}"
    return ""


@dataclass
class Download:
    """A download under way.

    Attributes:
        source: where it comes from.
        target: where it goes.
        what: its name in sentences.
        listed: what it must be, as far as that is known.
    """

    source: Source
    target: Path
    what: str
    listed: Listed
    got: Digests = field(default_factory=Digests)

    @property
    def part(self) -> Path:
        """What has come."""
        return self.target.with_name(f".{self.target.name}.part")

    @property
    def note(self) -> Path:
        """Of what it is a part."""
        return self.target.with_name(f".{self.target.name}.part.json")

    def run(self, here: Callable[[], Listed | None]) -> Listed:
        """Fetch the file, or go on with it; what it is.

        Args:
            here: what is known of the file where it is whole already; asked when nobody else writes it.

        Raises:
            DataError: it does not come, or twice came as something else.
            Refused: the server gives it to nobody, or not to us.
        """
        with claim(self.target.with_name(f".{self.target.name}.claim"), self.what) as held:
            found = here()
            if found is not None:
                log.info("%s: is here already", self.what)
                return found
            return self._whole(held)

    def _whole(self, held: Claim) -> Listed:
        for last in (False, True):
            try:
                self._complete(held)
                self._check()
                break
            except Wrong as error:
                files.remove(self.part)
                files.remove(self.note)
                if last:
                    raise DataError(
                        f"{self.what} came twice as something else: {error}",
                        hint="the server, a mirror or a proxy changes files; what came was removed",
                    ) from error
                log.warning("%s came as something else, and is fetched again: %s", self.what, error)
        files.sync(self.part)
        self.part.replace(self.target)
        files.sync(self.target.parent, deep=False)
        files.remove(self.note)
        return self.got.listed

    def _check(self) -> None:
        wrong = difference(self.got.listed, self.listed)
        if wrong:
            raise Wrong(wrong)

    def _complete(self, held: Claim) -> None:
        """Bring the part to its end."""
        known = self._begin()
        if self.got.size:
            log.info("%s: goes on after %d bytes", self.what, self.got.size)
        patience = Patience(self.what)
        with self.part.open("r+b" if self.part.is_file() else "w+b") as file:
            file.seek(self.got.size)
            while True:
                before = self.got.size
                try:
                    self._stream(file, known, held)
                    break
                except Transient as why:
                    file.flush()
                    if self.got.size > before:
                        patience.progressed()
                    patience.wait(why)
            file.truncate()

    def _begin(self) -> dict[str, Any]:
        """Take what lies there if it is of this file; what is noted of it."""
        expected = self.listed.model_dump()
        sure = bool(self.listed.sha256 or self.listed.git_sha1)
        known: dict[str, Any] = {}
        with suppress(DataError):
            known = files.read_json(self.note)
        same = isinstance(known, dict) and known.get("listed") == expected
        validator = same and known.get("validator") and known.get("url") == self.source.url
        self.got = Digests(self.listed.bytes)
        most = self.listed.bytes or sys.maxsize
        if same and (sure or validator) and self.part.is_file() and self.part.stat().st_size <= most:
            self.got = digests(self.part, self.listed.bytes or 0)
            return known
        files.remove(self.part)
        note = {"url": self.source.url, "listed": expected, "validator": ""}
        self.target.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(self.note, note)
        return note

    def _stream(self, file: IO[bytes], known: dict[str, Any], held: Claim) -> None:
        """Take one answer, from where we are.

        Raises:
            Transient: it ended early.
            Wrong: it is none of the listed file.
        """
        headers = {"Range": f"bytes={self.got.size}-"} if self.got.size else {}
        if self.got.size and known["validator"]:
            headers["If-Range"] = known["validator"]
        with get(self.source, headers) as answer:
            told = {name.title(): value for name, value in answer.headers.items()}
            total = self._place(file, answer.status, told)
            if answer.status == OUT_OF_RANGE:
                return
            if total is not None and self.listed.bytes not in (None, total):
                raise Wrong(self._another(read(answer, len(MAGIC)), total))
            if not self.got.size:
                self._remember(known, told)
            self._take(file, answer, total, held)
        wanted = total if total is not None else self.listed.bytes
        if wanted is not None and self.got.size < wanted:
            raise Transient(f"the connection ended at {self.got.size} of {wanted} bytes")

    def _take(self, file: IO[bytes], answer: HTTPResponse, total: int | None, held: Claim) -> None:
        looked = said = time.monotonic()
        while content := read(answer, CHUNK):
            if time.monotonic() - looked > LOOK_EVERY:
                looked = time.monotonic()
                held.check()
            file.write(content)
            self.got.update(content)
            if self.listed.bytes is not None and self.got.size > self.listed.bytes:
                raise Wrong(f"more than the {self.listed.bytes} bytes that are listed")
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                log.info("%s: %d of %s MB", self.what, self.got.size >> 20, (total or 0) >> 20 or "?")

    def _place(self, file: IO[bytes], status: int, headers: Mapping[str, str]) -> int | None:
        """Go where the answer begins; the size of the whole file, where the answer says it."""
        found = RANGE.fullmatch(headers.get("Content-Range", ""))
        total = int(found[2]) if found and found[2] != "*" else None
        if status == PARTIAL and found and found[1] == str(self.got.size):
            return total
        if status == OUT_OF_RANGE and total == self.got.size and self.listed.bytes in (None, total):
            return total
        resumed = self.got.size
        file.seek(0)
        file.truncate()
        self.got = Digests(self.listed.bytes)
        if status in (PARTIAL, OUT_OF_RANGE):
            raise Transient(f"the server does not go on after {resumed} bytes")
        length = headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None

    def _another(self, head: bytes, total: int) -> str:
        if is_pointer(head):
            return "git's LFS pointer, not the file it stands for"
        return f"{total} bytes, listed are {self.listed.bytes}"

    def _remember(self, known: dict[str, Any], headers: Mapping[str, str]) -> None:
        """Note what says that a later answer is of the same file; a weak tag does not."""
        tag = headers.get("Etag", "")
        known["validator"] = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")
        if self.listed.sha256 or self.listed.git_sha1:
            known["validator"] = ""  # the digest says it, and each mirror has tags of its own
        files.write_json(self.note, known)
