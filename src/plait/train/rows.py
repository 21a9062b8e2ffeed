"""A file of one line an iteration, which a run goes on with: what a job trains again is dropped first.

Each line is strict JSON, its iteration first. JSON has no number that is not finite: a figure that is none is
the string ``nan``, ``inf`` or ``-inf``, which ``float`` reads.
"""

import json
import math
import re
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from plait.errors import DataError
from plait.files import appears_whole, sync

BEGIN = re.compile(r'\{"iteration": (\d+)[,}]')
"""How a row begins; rows of thousands of samples are not parsed to see which iteration they are of."""


class Rows:
    """The rows of a file; those of the iterations that a job trains are dropped first, others stay."""

    def __init__(self, path: Path, *, start: int, stop: int) -> None:
        """Open the file to go on after iteration ``start``.

        Raises:
            DataError: the file has a line that is no row.
        """
        self.path, self.start, self.stop = path, start, stop
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [(step, line) for step, line in numbered(path) if not start < step <= stop]
        self.later = any(step > stop for step, _ in kept)
        """Whether there are rows of later iterations than the job's."""
        self._replace(kept)

    def before(self) -> list[dict[str, Any]]:
        """The rows up to the iteration that the job started after, in their order."""
        found = sorted(numbered(self.path), key=itemgetter(0))
        return [json.loads(line) for step, line in found if step <= self.start]

    def __enter__(self) -> Self:
        """The rows themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Put the rows in order of their iterations."""
        self._replace(sorted(numbered(self.path), key=itemgetter(0)))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_line({"iteration": row["iteration"], **row}) + "\n")

    def sync(self) -> None:
        """Make the rows so far durable."""
        if self.path.exists():
            sync(self.path)

    def _replace(self, rows: list[tuple[int, str]]) -> None:
        text = "".join(line for _, line in rows)
        if text != (self.path.read_text(encoding="utf-8") if self.path.exists() else ""):
            with appears_whole(self.path) as part:
                part.write_text(text, encoding="utf-8")


def to_line(row: dict[str, Any]) -> str:
    """A row as strict JSON."""
    told = {name: _strict(value) for name, value in row.items()}
    return json.dumps(told, allow_nan=False)


def _strict(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def numbered(path: Path) -> Iterator[tuple[int, str]]:
    """The whole lines of a file, each with its iteration; a job killed while writing may leave half of one.

    Raises:
        DataError: a line is no row.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith("\n"):
                yield _iteration(line, f"{path} line {number}"), line


def _iteration(line: str, where: str) -> int:
    """The iteration of a row; another program may have written it in another order."""
    if found := BEGIN.match(line):
        return int(found[1])
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{where} is not the row of an iteration: {line.strip()[:80]!r}",
            hint="mend or remove the line; the run's checkpoints do not depend on it",
        ) from error
