"""Records that the index stage cannot use: each is written down with its reason, and counted."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import orjson

from plait.errors import DataError

NAME = "rejects.jsonl"
SHOWN = 3
"""Rejected records that an error quotes."""


@dataclass(frozen=True, slots=True)
class Record:
    """Where a record stands."""

    file: Path
    line: int
    id: str


@dataclass
class Rejects:
    """Writes a line for each rejected record."""

    out: BinaryIO
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, record: Record, reason: str, sentence: str) -> None:
        """Write one down."""
        entry = {
            "file": os.path.relpath(record.file),
            "line": record.line,
            "id": record.id,
            "reason": reason,
            "message": sentence,
        }
        self.out.write(orjson.dumps(entry) + b"\n")
        self.reasons[reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{record.file} line {record.line}: {sentence}")

    def check(self, read: int, limit: float, chats: Iterable[Path]) -> None:
        """Refuse a shard of which too much is rejected.

        Args:
            read: records of the shard, rejected ones among them.
            limit: share of them that may be rejected.
            chats: where they come from.

        Raises:
            DataError: more are.
        """
        if self.reasons.total() <= limit * read:
            return
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
        raise DataError(
            f"{self.reasons.total()} of {read} records of {', '.join(map(str, chats))} are rejected "
            f"({reasons}); at most {limit:.2%} may be; {'; '.join(self.first)}",
            hint="mend the source, name another template, or raise `reject_limit` of the format in config/",
        )
