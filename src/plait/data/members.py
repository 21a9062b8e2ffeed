"""Members of a list or of an object in JSON, one at a time: the whole may be larger than memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from plait.errors import DataError

CHUNK = 1 << 20
LONGEST = 1 << 24
"""Characters that a mistake in the JSON may lie behind what was read; no record is near it."""
LONGEST_EXPONENT = len("e+")
"""Behind a number that was cut, no more than this is left of it."""
DECODER = json.JSONDecoder()
SPACE = re.compile(r"\s*")
KEY = "id"
"""Under this a member of an object has its own key."""


def members(path: Path, hint: str = "", *, inside: str | None = None) -> Iterator[Any]:
    """The members of a list.

    Args:
        path: a file of JSON in UTF-8.
        hint: what the file should be, for who reads an error.
        inside: None: the file is a list. A name: it may also be an object, which has the list under that
            name. Empty: it may be an object whose values are the records; each gets its key as ``id``.

    Raises:
        DataError: it is none of these, is not JSON, or is cut short.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for found in _whole(path, file, hint, inside):
                yield found
                number += 1
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read after record {number}: {error}", hint=hint) from error


def _whole(path: Path, file: TextIO, hint: str, inside: str | None) -> Iterator[Any]:
    """The members of the file's one value, behind which nothing stands."""
    reader = _Reader(path, file, hint)
    mark = reader.mark()
    if mark == "[":
        yield from reader.listed()
    elif mark == "{" and inside is not None:
        yield from reader.named(inside)
    else:
        raise DataError(f"{path} is no list of records", hint=hint)
    if reader.mark():
        raise DataError(f"{path} goes on after its list of {reader.number} records", hint=hint)


class _Reader:
    """Reads marks and values from a file of JSON."""

    def __init__(self, path: Path, file: TextIO, hint: str) -> None:
        self.path, self.file, self.hint = path, file, hint
        self.text, self.at, self.over = "", 0, False
        self.number = 0

    def more(self) -> bool:
        """Read on, behind what is not used up; whether there was more."""
        found = self.file.read(CHUNK)
        self.text, self.at = self.text[self.at :] + found, 0
        self.over = not found
        return not self.over

    def at_mark(self) -> bool:
        """Stand before the next character that is no space, if there is one."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr] # nothing matches too
            if self.at < len(self.text):
                return True
            if not self.more():
                return False

    def mark(self) -> str:
        """The next character that is no space; nothing at the end of the file."""
        if not self.at_mark():
            return ""
        self.at += 1
        return self.text[self.at - 1]

    def value(self) -> Any:
        """The next value; reads on while it may be unfinished."""
        self.at_mark()
        while True:
            start = self.at
            try:
                found, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - error.pos > LONGEST or self.over:
                    raise
                end = 0  # the error is not kept: it would keep the text
            if end and len(self.text) - end > LONGEST_EXPONENT:
                self.at = end
                return found
            if not self.more() and end:
                self.at = end - start
                return found

    def separated(self, end: str) -> Iterator[None]:
        """Stands before each member, up to the end of a list or of an object."""
        mark = self.mark()
        if mark != end:
            self.at -= len(mark)
        while mark != end:
            yield
            mark = self.mark()
            if mark not in (",", end):
                sentence = f"{self.path} has neither comma nor end after record {self.number}"
                raise DataError(sentence, hint=self.hint)

    def listed(self) -> Iterator[Any]:
        """The members of a list that has begun."""
        for _ in self.separated("]"):
            found = self.value()
            self.number += 1
            yield found

    def named(self, inside: str) -> Iterator[Any]:
        """The records of an object that has begun: its values, or the list under a name."""
        lists = 0
        for _ in self.separated("}"):
            key = self.value()
            if not isinstance(key, str) or self.mark() != ":":
                sentence = f"{self.path} has no name with a colon after record {self.number}"
                raise DataError(sentence, hint=self.hint)
            if not inside:
                found = self.value()
                self.number += 1
                yield {KEY: key, **found} if isinstance(found, dict) else found
            elif key != inside:
                self.value()
            elif self.mark() == "[":
                lists += 1
                yield from self.listed()
        if inside and not lists:
            raise DataError(f"{self.path} has no list under {inside!r}", hint=self.hint)
