"""A shard of chat records: every line of its share of a raw source ends as kept or rejected.

Beside ``shard_00000.jsonl.gz`` stand ``shard_00000.rejects.jsonl``, one line a rejected line with
its file, number, reason and a sentence, ``shard_00000.said`` with what the records are compared by
(:mod:`plait.data.said`) and, written last, ``shard_00000.ledger.json`` with the counts.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
from msgspec.structs import replace

from plait import files
from plait.data import chat, images, ledger, shaped, sources
from plait.data.lines import RawLine, read_lines
from plait.errors import DataError, LeftOut, RecordError
from plait.layout import Chat, said_of
from plait.progress import bar

if TYPE_CHECKING:
    from isal.igzip import IGzipFile

log = logging.getLogger(__name__)

GZIP_LEVEL = 2
"""Of ISA-L's 0 to 3. Most bytes are base64, which no level shrinks by more than a quarter."""


@dataclass
class Counts:
    """What became of the lines of a shard.

    Attributes:
        lines: those of the whole raw source.
        share: those that are the shard's.
    """

    lines: int = 0
    share: int = 0
    read: int = 0
    kept: int = 0
    images: int = 0
    blank: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: str = ""
    """Where the first rejected line is, and why it is rejected."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Those that a rule of the config leaves out, by rule; none of them is wrong."""

    @property
    def rejected(self) -> int:
        """Lines that were rejected, for whatever reason."""
        return self.reasons.total()

    def check(self, shard: Chat) -> None:
        """Every line of the shard's share was read or is blank, and was kept, rejected or left out.

        Raises:
            DataError: one was not.
        """
        ledger.balance(f"raw -> chat, {shard}", self.share, {"read": self.read, "blank": self.blank})
        went = {"kept": self.kept, "rejected": self.rejected, "left_out": self.left_out.total()}
        ledger.balance(f"the ledger of {shard}", self.read, went)

    def to_json(self) -> dict[str, Any]:
        """The counts of a ledger."""
        return {
            "lines": self.lines,
            "read": self.read,
            "kept": self.kept,
            "rejected": self.rejected,
            "blank": self.blank,
            "images": self.images,
            "reasons": dict(sorted(self.reasons.items())),
            "left_out": dict(sorted(self.left_out.items())),
        }


def write(raw: Path, shard: Chat, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write one shard, its rejects and its ledger.

    Args:
        raw: the folder of the raw source.
        shard: what to write.
        settings: ``source``, ``shards``, ``pictures`` and ``reject_limit``, as the config has them.

    Returns:
        The ledger.

    Raises:
        DataError: more lines are rejected than ``reject_limit`` allows, there is no line at all,
            or the dataset has no such shard.
        LayoutError: what stands there was not made by plait.
    """
    if shard.shard >= settings["shards"]:
        last = f"{settings['shards'] - 1:05d}"
        raise DataError(f"{shard} is beyond the last shard of {shard.dataset}, {last}")
    shaped.check_told(settings)
    files.refuse_foreign(shard)
    for path in (shard.manifest, str(shard), shard.rejects, said_of(str(shard))):
        files.remove(Path(path))
    with files.appears_whole(str(shard)) as part, ExitStack() as stack:
        with files.appears_whole(shard.rejects) as rejects:
            counts = _sort(raw, shard, settings, part, rejects, Said(Path(said_of(str(shard))), stack))
        counts.check(shard)
        _check_share(counts, shard, settings)
    written = {
        "schema": files.SCHEMA,
        "kind": "chat",
        "settings": settings,
        "inputs": {str(raw): files.digest_of_input(raw)},
        **counts.to_json(),
        "bytes": Path(str(shard)).stat().st_size,
        "sha256": files.digest(str(shard)),
    }
    files.write_json(shard.manifest, written)
    log.info("%s: kept %d of %d lines, %d pictures", shard, counts.kept, counts.read, counts.images)
    return written


def read(path: Path | str) -> Iterator[chat.Sample]:
    """The conversations of a shard, in file order, pictures as encoded bytes.

    Raises:
        DataError: the file is missing, cut short, or holds a line that plait did not write.
    """
    for number, line in read_lines(path):
        try:
            yield chat.parse(line)
        except RecordError as error:
            raise DataError(f"{path} line {number}: {error}", hint="make the shard again") from error


def _sort(
    raw: Path, shard: Chat, settings: Mapping[str, Any], kept: Path, rejects: Path, said: "Said"
) -> Counts:
    """Write each line of the shard's share to one of the two files."""
    counts = Counts()
    read_line = sources.reader(settings["source"])
    resize = partial(images.resized, pictures=settings["pictures"])
    share = sources.Share(raw, settings["source"], shard.shard, settings["shards"])
    with ExitStack() as stack:
        good = stack.enter_context(_gzip(stack.enter_context(kept.open("wb"))))
        bad = stack.enter_context(rejects.open("wb"))
        for line in bar(share, str(shard), "line"):
            if line.blank:
                counts.blank += 1
                continue
            counts.read += 1
            try:
                sample = read_line(line.content, raw).with_pictures(resize)
                placed = replace(sample, source=chat.Source(line.file, line.number))
                written = placed.to_line(f"{shard.dataset}-{line.position}")
            except LeftOut as error:
                counts.left_out[error.reason] += 1
                continue
            except RecordError as error:
                counts.reasons[error.reason] += 1
                counts.first = counts.first or f"{line.file} line {line.number}: {error}"
                bad.write(_reject(line, error))
                continue
            good.write(written + b"\n")
            said.append(sample, written)
            counts.kept += 1
            counts.images += len(sample.pictures)
        said.end()
    counts.lines, counts.share = share.lines, share.own
    return counts


class Said:
    """Writes what records are compared by, unless they are few and small: that takes what is slow to load."""

    def __init__(self, target: Path, stack: ExitStack) -> None:
        """Take where to write; the file appears whole when the stack ends well."""
        self._target, self._stack = target, stack
        self._out: BinaryIO | None = None
        self._held: list[tuple[chat.Sample, bytes]] = []
        self._size = 0

    def append(self, sample: chat.Sample, line: bytes) -> None:
        """Note a record and the line that it is written as."""
        self._held.append((sample, line))
        self._size += len(line)
        if len(self._held) == chat.SAMPLES or self._size >= chat.BYTES:
            self._write()

    def end(self) -> None:
        """Write what is left."""
        if self._out and self._held:
            self._write()

    def _write(self) -> None:
        from plait.data import said

        if self._out is None:
            part = self._stack.enter_context(files.appears_whole(self._target))
            self._out = self._stack.enter_context(part.open("wb"))
        samples, lines = zip(*self._held, strict=True)
        self._out.write(said.rows(samples, lines).tobytes())
        self._held, self._size = [], 0


def _gzip(file: BinaryIO) -> "IGzipFile":
    """A gzip stream without a name or a time in it; its bytes follow from its content alone.

    The name of a file that is still to be renamed has the number of this process. On base64 it is some eight
    times as quick as zlib, and the smaller.
    """
    from isal import igzip

    return igzip.IGzipFile("", "wb", GZIP_LEVEL, file, 0)


def _reject(line: RawLine, error: RecordError) -> bytes:
    entry = {"file": line.file, "line": line.number, "reason": error.reason, "message": str(error)}
    return orjson.dumps(entry) + b"\n"


def _check_share(counts: Counts, shard: Chat, settings: Mapping[str, Any]) -> None:
    if not counts.read:
        if not counts.lines:
            raise DataError(
                f"the raw source of {shard} has no line", hint="look at the files of its `source`"
            )
        raise DataError(f"no line of the raw source falls to {shard}", hint="lower `shards` in config/")
    limit = settings["reject_limit"]
    if counts.rejected > limit * counts.read:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.reasons.most_common())
        raise DataError(
            f"{counts.rejected} of {counts.read} lines of {shard} are rejected ({reasons}); "
            f"at most {limit:.2%} may be. The first: {counts.first}",
            hint="mend the source, or raise `reject_limit` in config/",
        )
