"""What ``energon prepare`` would write for tars of ours, noted while they are written.

Beside each tar ``NAME.tar.idx`` says where its samples begin and where the last one ends. In ``.nv-meta``
``index.sqlite`` finds samples and their parts, ``.info.json`` counts samples, ``split.yaml`` deals shards
out, and ``index.uuid`` tells one preparation from another. Energon, which loads torch, is not loaded.
"""

import json
import re
import sqlite3
from array import array
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from plait.config.paths import SPLIT
from plait.data import meta
from plait.data.meta import INFO, META, PARTS
from plait.data.tars import Entry
from plait.errors import DataError

ENERGON = "7.4.1"
"""The version of megatron-energon whose files these are; ``envs/cpu.in`` pins it."""
BATCH = 4096
"""Samples that are noted at once."""
NOTES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TEMP TABLE noted (tar, number, key, start, size, PRIMARY KEY (tar, number)) WITHOUT ROWID;
CREATE TEMP TABLE noted_parts (tar, number, name, start, size, PRIMARY KEY (tar, start)) WITHOUT ROWID;
"""
TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL,
    sample_key TEXT NOT NULL UNIQUE,
    sample_index INTEGER NOT NULL,
    byte_offset INTEGER,
    byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER,
    sample_index INTEGER,
    part_name TEXT,
    content_byte_offset INTEGER,
    content_byte_size INTEGER
);
"""
INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(
    tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size
);
"""
SAMPLES = "INSERT INTO samples SELECT ?, key, number, start, size FROM noted WHERE tar = ? ORDER BY number"
SAMPLE_PARTS = """
INSERT INTO sample_parts SELECT ?, number, name, start, size FROM noted_parts WHERE tar = ? ORDER BY start
"""
OFFSETS = "SELECT start FROM noted WHERE tar = ? ORDER BY number"
END = "SELECT start + size FROM noted WHERE tar = ? ORDER BY number DESC LIMIT 1"
HINT = "look at split, split_parts and exclude of the dataset's energon keys"


class Index:
    """Where samples and their parts stand in tars; in temporary files until it is saved.

    Tars are numbered in the order of their names, which need not be the one that they are written in.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder of the tars, which is not prepared yet."""
        self.folder = folder
        (folder / META).mkdir()
        self._known = sqlite3.connect(folder / META / "index.sqlite", isolation_level=None)
        self._known.executescript(NOTES)
        self._samples: list[tuple[str, int, str, int, int]] = []
        self._parts: list[tuple[str, int, str, int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._known.close()

    def note(self, tar: str, number: int, key: str, entry: Entry) -> None:
        """Note the sample of a number in a tar."""
        self._samples.append((tar, number, key, entry.start, entry.end - entry.start))
        self._parts.extend((tar, number, name, start, size) for name, start, size in entry.parts)
        if len(self._samples) == BATCH:
            self._write()

    def save(self, shards: Mapping[str, int], split: Mapping[str, Sequence[str]]) -> None:
        """Write all but the dataset's description.

        Args:
            shards: samples of each tar that is part of the dataset.
            split: tars of each part.
        """
        names = sorted(shards)
        self._write()
        self._known.executescript(TABLES)
        self._known.execute("BEGIN")
        for number, name in enumerate(names):
            for rows in (SAMPLES, SAMPLE_PARTS):
                self._known.execute(rows, (number, name))
            starts = array("Q", (start for (start,) in self._known.execute(OFFSETS, (name,))))
            starts.extend(self._known.execute(END, (name,)).fetchone())
            (self.folder / f"{name}.idx").write_bytes(starts.tobytes())
        self._known.execute("COMMIT")
        self._known.executescript(INDEXES)
        info = {"energon_version": ENERGON, "shard_counts": {name: shards[name] for name in names}}
        (self.folder / INFO).write_text(json.dumps(info, indent=2), encoding="utf-8")
        (self.folder / META / "index.uuid").write_text(str(uuid4()), encoding="utf-8")
        parts = {part: collapsed(chosen) for part, chosen in split.items()}
        meta.write_yaml(self.folder / SPLIT, {"split_parts": parts, "exclude": []})

    def _write(self) -> None:
        self._known.execute("BEGIN")
        self._known.executemany("INSERT INTO noted VALUES (?, ?, ?, ?, ?)", self._samples)
        self._known.executemany("INSERT INTO noted_parts VALUES (?, ?, ?, ?, ?)", self._parts)
        self._known.execute("COMMIT")
        self._samples.clear()
        self._parts.clear()


def dealt(names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tars of each part, dealt out whole and in order, as ``split`` or ``split_parts`` ask.

    Args:
        names: all tars, in order.
        settings: ``datasets.*.energon`` of the config.

    Raises:
        DataError: a pattern of ``split_parts`` is none.
    """
    if settings["split_parts"]:
        return {part: _matching(names, pattern) for part, pattern in settings["split_parts"].items()}
    # as they are written: energon sums them as binary fractions, and loses the last tar of 7, 2, 1
    shares = [Fraction(str(one)) for one in settings["split"]]
    ends = [int(len(names) * upto / sum(shares)) for upto in accumulate(shares)]
    return {part: [*names[s:e]] for part, s, e in zip(PARTS, [0, *ends[:-1]], ends, strict=True)}


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    """The names that begin as one of the patterns does that braces stand for."""
    from braceexpand import braceexpand

    try:
        patterns = [re.compile(one) for one in braceexpand(pattern)]
    except (ValueError, re.error) as error:
        raise DataError(f"split_parts has {pattern!r}, which is no pattern: {error}", hint=HINT) from error
    return [name for name in names if any(one.match(name) for one in patterns)]


def collapsed(names: Sequence[str]) -> list[str]:
    """Names with each row of them that counts up in one place as one name with braces.

    >>> collapsed(["a/00.tar", "a/01.tar", "a/02.tar", "a/9.tar", "a/10.tar"])
    ['a/{00..02}.tar', 'a/9.tar', 'a/10.tar']
    """
    rows: list[list[list[str]]] = []
    place = None
    for pieces in (re.split(r"(\d+)", name) for name in names):
        step = _step(rows[-1][-1], pieces) if rows else None
        if step is None or (len(rows[-1]) > 1 and step != place):
            rows.append([pieces])
        else:
            rows[-1].append(pieces)
        place = step
    return [_in_braces(row) for row in rows]


def _step(before: Sequence[str], after: Sequence[str]) -> int | None:
    """The one piece by which a name differs from the one before, a number that is one more."""
    if len(before) != len(after):
        return None
    places = [place for place, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    if len(places) != 1 or not places[0] % 2:
        return None
    old, new = before[places[0]], after[places[0]]
    return places[0] if len(old) == len(new) and int(new) == int(old) + 1 else None


def _in_braces(row: Sequence[Sequence[str]]) -> str:
    pairs = zip(row[0], row[-1], strict=True)
    return "".join(first if first == last else f"{{{first}..{last}}}" for first, last in pairs)
