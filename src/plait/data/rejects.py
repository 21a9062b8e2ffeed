"""Records that a stage cannot use: each is written down with its reason, and counted."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from plait.errors import DataError

NAME = "rejects.jsonl"
SHOWN = 3
"""Rejected records that an error quotes."""


class Record(NamedTuple):
    """Where a record stands: in a line of a file, or in a tar by its key."""

    file: Path
    line: int | None
    id: str

    def __str__(self) -> str:
        """As a sentence begins with it."""
        return f"{self.file}: sample {self.id!r}" if self.line is None else f"{self.file} line {self.line}"


@dataclass
class Rejects:
    """Writes a line for each rejected record."""

    out: BinaryIO
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.reasons.total()

    def add(self, record: Record, reason: str, sentence: str) -> None:
        """Write one down."""
        entry = {
            "file": os.path.relpath(record.file),
            **({} if record.line is None else {"line": record.line}),
            "id": record.id,
            "reason": reason,
            "message": sentence,
        }
        self.out.write(orjson.dumps(entry) + b"\n")
        self.reasons[reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{record}: {sentence}")

    def check(self, read: int, limit: float, where: str, hint: str) -> None:
        """Refuse data of which too much is rejected.

        Args:
            read: records that were read, rejected ones among them.
            limit: share of them that may be rejected.
            where: where they come from.
            hint: what to do.

        Raises:
            DataError: more are.
        """
        if self.count <= limit * read:
            return
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
        raise DataError(
            f"{self.count} of {read} records of {where} are rejected "
            f"({reasons}); at most {limit:.2%} may be; {'; '.join(self.first)}",
            hint=hint,
        )


def ids(path: Path) -> frozenset[str]:
    """The ids of the rejected records of a file; none where there is no file."""
    if not path.is_file():
        return frozenset()
    return frozenset(orjson.loads(line)["id"] for line in path.read_bytes().splitlines())


def counted(folder: Path, below: str) -> int:
    """Rejected records in a folder's file of them that stand below another folder; 0 where there is none."""
    path = folder / NAME
    if not path.is_file():
        return 0
    entries = map(orjson.loads, path.read_bytes().splitlines())
    return sum(Path(below) in Path(entry["file"]).parents for entry in entries)


def to_json(reasons: Counter[str]) -> dict[str, int]:
    """How many were rejected for each reason, as manifests have it."""
    return dict(sorted(reasons.items()))
