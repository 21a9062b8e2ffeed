"""Git LFS: the few lines that stand for a large file where nobody has fetched it."""

from collections.abc import Iterable
from pathlib import Path

from plait.errors import DataError

MAGIC = b"version https://git-lfs.github.com/spec/v1"
LARGEST = 1024


def is_pointer(content: bytes) -> bool:
    """Whether a file that begins so is a pointer."""
    return content.startswith(MAGIC)


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuse files that a clone without ``git lfs`` has.

    Raises:
        DataError: it names the first of them, and how to fetch the rest.
    """
    found = [path for path in paths if path.is_file() and path.stat().st_size <= LARGEST and _points(path)]
    if found:
        more = f" and {len(found) - 1} more are pointers" if len(found) > 1 else " is a pointer"
        raise DataError(
            f"{found[0]}{more} of git LFS: the large files were never fetched",
            hint=f"git -C {found[0].resolve().parent} lfs pull",
        )


def _points(path: Path) -> bool:
    with path.open("rb") as file:
        return is_pointer(file.read(len(MAGIC)))
