"""A file of one line an iteration, which a run goes on with: what a job trains again is dropped first."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from plait.files import appears_whole, sync


class Rows:
    """The rows of a file; those of the iterations that a job trains are dropped first, others stay."""

    def __init__(self, path: Path, *, start: int, stop: int) -> None:
        """Open the file to go on after iteration ``start``."""
        self.path, self.start, self.stop = path, start, stop
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in whole_lines(path) if not start < iteration_of(line) <= stop]
        self.later = any(iteration_of(line) > stop for line in kept)
        """Whether there are rows of later iterations than the job's."""
        self._replace(kept)

    def before(self) -> list[dict[str, Any]]:
        """The rows up to the iteration that the job started after, in their order."""
        rows = [json.loads(line) for line in sorted(whole_lines(self.path), key=iteration_of)]
        return [row for row in rows if row["iteration"] <= self.start]

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
        self._replace(sorted(whole_lines(self.path), key=iteration_of))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Make the rows so far durable."""
        if self.path.exists():
            sync(self.path)

    def _replace(self, lines: list[str]) -> None:
        text = "".join(lines)
        if text != (self.path.read_text(encoding="utf-8") if self.path.exists() else ""):
            with appears_whole(self.path) as part:
                part.write_text(text, encoding="utf-8")


def whole_lines(path: Path) -> list[str]:
    """The whole lines of a file; a job killed while writing may have left half of one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def iteration_of(line: str) -> int:
    """The iteration of a row."""
    return int(json.loads(line)["iteration"])
