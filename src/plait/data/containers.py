"""Files of records: lines of JSON, lists of JSON, parquet. What the records are is for shapes to say.

Lines and rows are read in place, from any of them on; members of a list only from the first on.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from plait.data.lines import read_lines
from plait.data.members import members
from plait.errors import DataError, RecordError

PARQUET = ".parquet"
LIST = ".json"
"""How the name of a file ends that is one value of JSON; with ``.gz`` and so on behind it has lines."""
PAGE = 1 << 20
"""Bytes of a column that are read at a time."""
ROWS, BYTES = 16, 4 << 20
"""Rows of parquet that are in memory at a time, and about how much of them: each may have pictures in it."""


def is_list(path: Path | str) -> bool:
    """Whether a file can only be read from its beginning on."""
    return Path(path).suffix == LIST


def count(path: Path) -> int:
    """The records of a file of lines, blank ones too, or of parquet.

    Raises:
        DataError: it is damaged.
    """
    if path.suffix != PARQUET:
        return sum(1 for _ in read_lines(path))
    with _parquet(path) as opened:
        return int(opened.metadata.num_rows)


def numbered(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """Records with their numbers from 1; of lines their bytes, of parquet values by column.

    Args:
        path: a file of lines or of parquet.
        start: records before the first one; their groups of parquet are not read.
        stop: records before the one that is no longer given; None: all are.

    Raises:
        DataError: the file is damaged.
    """
    if path.suffix == PARQUET:
        return enumerate(_rows(path, start, stop), start=start + 1)
    return islice(read_lines(path), start, stop)


def whole(path: Path, inside: str | None = None) -> Iterator[Any]:
    """Every record of a file of any kind as a value of JSON or of parquet.

    Args:
        path: the file.
        inside: as :func:`plait.data.members.members` has it.

    Raises:
        DataError: the file is damaged.
    """
    if is_list(path):
        yield from members(path, "a list of records, or lines of JSON in a .jsonl", inside=inside)
        return
    for _, content in numbered(path):
        if not isinstance(content, bytes) or content.strip():
            yield content


def value(content: Any) -> Any:
    """A record's value, from its line if it is one.

    Raises:
        RecordError: the line is not JSON.
    """
    if not isinstance(content, bytes):
        return content
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error}", reason="bad_json") from error


def _rows(path: Path, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
    """Rows of parquet: of the groups that hold them, a few at a time."""
    with _parquet(path) as opened:
        first, left = 0, (opened.metadata.num_rows if stop is None else stop) - start
        for group in range(opened.metadata.num_row_groups):
            size = opened.metadata.row_group(group).num_rows
            skipped, first = start - first, first + size
            if left <= 0 or first <= start:
                continue
            for row in islice(_group(path, opened, group), max(skipped, 0), None):
                yield row
                left -= 1
                if not left:
                    return


def _group(path: Path, opened: Any, group: int) -> Iterator[Mapping[str, Any]]:
    about = opened.metadata.row_group(group)
    rows = max(min(ROWS, BYTES * about.num_rows // max(about.total_byte_size, 1)), 1)
    with _in_a_sentence(path):
        for batch in opened.iter_batches(batch_size=rows, row_groups=[group], use_threads=False):
            yield from batch.to_pylist()


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    with _in_a_sentence(path):
        return parquet.ParquetFile(path, buffer_size=PAGE, pre_buffer=False)


class _in_a_sentence:  # noqa: N801 - it reads as one in the places where it stands
    """Says of pyarrow's errors which file they are of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException | OSError | UnicodeDecodeError):
            raise DataError(
                f"{self.path} cannot be read as parquet: {error}", hint="is it another kind of file?"
            ) from error
