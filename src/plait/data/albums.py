"""Pictures that records name: in a folder, or in zips and tars that are read in place.

Where each lies is found once, when the raw source is made, and stands in the record. The names are kept in a
database on the disk for as long: there may be more of them than fit into memory.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

from plait.data import containers, zipped
from plait.errors import DataError, RecordError

ARCHIVES = (".zip", ".tar")
Place = list[Any]
"""A file's name; in an archive: its name, offset, packed bytes, how they are packed, and bytes."""


class _OnDisk:
    """A table that is there until it was asked all that it knows."""

    def __init__(self, database: Path) -> None:
        import sqlite3

        self.database = database
        database.unlink(missing_ok=True)
        self.rows = sqlite3.connect(database)
        self.rows.execute("pragma journal_mode = off")
        self.rows.execute("pragma synchronous = off")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.rows.close()
        self.database.unlink(missing_ok=True)


class Album(_OnDisk):
    """The pictures below a folder, or of one archive, by name."""

    def __init__(self, root: Path, database: Path, *, deep: bool = True) -> None:
        """Look into every archive.

        Args:
            root: the folder or the archive.
            database: a file that is written, and removed at the end.
            deep: whether archives in folders below count too.

        Raises:
            DataError: an archive is damaged.
        """
        super().__init__(database)
        self.root = root = root.resolve()  # a link's name does not say what it leads to
        self.rows.execute(
            "create table found (name text, base text, archive text, a int, b int, c int, d int)"
        )
        self.rows.execute("create table alias (wanted text primary key, name text) without rowid")
        for archive in archives(root, deep=deep):
            self._note(archive)
        self.rows.execute("create index by_name on found (name)")
        self.rows.execute("create index by_base on found (base)")
        self.inside = bool(self.rows.execute("select 1 from found limit 1").fetchone())
        self.unlisted = deep and root.is_dir()

    def alias(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Let pictures go by other names too, as by the addresses that img2dataset fetched them from."""
        self.rows.executemany("insert or ignore into alias values (?, ?)", pairs)

    def place(self, wanted: Any) -> Place | None:
        """Where a picture lies; None where there is none of that name.

        A name may have folders that the archive has not, or lack some that it has.

        Raises:
            RecordError: it is no name, or leads out of the folder.
        """
        name = named(wanted)
        if found := self.rows.execute("select name from alias where wanted = ?", (name,)).fetchone():
            name = found[0]
        if found := (self._listed(name) if self.inside else None) or self._as_file(name):
            return found
        if self.unlisted and not _address(name):
            self._list_files()
            return self._listed(name)
        return None

    def _as_file(self, name: str) -> Place | None:
        parts = PurePosixPath(name).parts if self.root.is_dir() and not _address(name) else ()
        for first in range(len(parts)):
            shorter = "/".join(parts[first:])
            if (self.root / shorter).is_file():
                return [shorter]
        return None

    def _list_files(self) -> None:
        """List the files of the folder too, once a name is not that of one as it stands."""
        found = (one for one in self.root.rglob("*") if one.is_file() and one.suffix not in ARCHIVES)
        rows = ((one.relative_to(self.root).as_posix(), one.name) for one in found)
        self.rows.executemany("insert into found (name, base) values (?, ?)", rows)
        self.inside, self.unlisted = True, False

    def _listed(self, name: str) -> Place | None:
        """The longest end of the name that is a file's; or the one file that is called as its last part."""
        parts = name.split("/")
        for first in range(len(parts)):
            query = "select name, archive, a, b, c, d from found where name = ? order by rowid desc limit 1"
            if found := self.rows.execute(query, ("/".join(parts[first:]),)).fetchone():
                return self._opened(*found)
        query = "select name, archive, a, b, c, d from found where base = ? limit 2"
        several = self.rows.execute(query, (parts[-1],)).fetchall()
        return self._opened(*several[0]) if len(several) == 1 else None

    def _opened(
        self, name: str, archive: str | None, begin: int, packed: int, kind: int, size: int
    ) -> Place | None:
        if archive is None:
            return [name]
        path = self.root / archive if archive else self.root
        if path.suffix == ".zip":
            if kind not in (zipped.STORED, zipped.DEFLATED):
                return None
            begin = zipped.content_at(path, begin)
        return [archive, begin, packed, kind, size] if size <= zipped.LARGEST else None

    def _note(self, archive: Path) -> None:
        name = "" if archive == self.root else archive.relative_to(self.root).as_posix()
        members = _of_zip(archive) if archive.suffix == ".zip" else _of_tar(archive)
        rows = ((one, PurePosixPath(one).name, name, *place) for one, place in members)
        self.rows.executemany("insert into found values (?, ?, ?, ?, ?, ?, ?)", rows)


def archives(root: Path, *, deep: bool) -> list[Path]:
    """The zips and tars of a folder, those in folders below too, or the archive itself."""
    inside = (root / "").rglob("*") if deep else root.glob("*")
    found = sorted(inside) if root.is_dir() else [root]
    return [one for one in found if one.suffix in ARCHIVES and one.is_file()]


def named(wanted: Any) -> str:
    """The name of a picture.

    Raises:
        RecordError: it is none, or it is outside the folder: a stranger's list must not read other files.
    """
    if not isinstance(wanted, str) or not wanted or "\0" in wanted:
        raise RecordError(f"image is {wanted!r}, not the name of a file", reason="missing_picture")
    path = PurePosixPath(wanted)
    if path.is_absolute() or ".." in path.parts:
        raise RecordError(f"picture {wanted} is outside the folder of pictures", reason="missing_picture")
    return wanted if _address(wanted) else path.as_posix()


def read(root: Path, place: Place) -> bytes:
    """The picture at a place.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        if len(place) == 1:
            return Path(root, place[0]).read_bytes()
        return zipped.read(root / place[0] if place[0] else root, place[1:])
    except OSError as error:
        raise RecordError(f"picture cannot be read: {error}", reason="missing_picture") from error


def digest(root: Path, place: Place | None) -> str | None:
    """The sha256 of the picture at a place; None where there is none."""
    if place is None:
        return None
    try:
        return hashlib.sha256(read(root, place)).hexdigest()
    except RecordError:
        return None


def addresses(folder: Path) -> Iterator[tuple[Any, Any]]:
    """The addresses in img2dataset's parquet files of a folder, and the names of the pictures fetched there.

    A key has the number of its shard in its first digits; SOLO's table of MMC4 has the shard beside it.
    """
    for path in sorted(folder.rglob(f"*{containers.PARQUET}")) if folder.is_dir() else ():
        for _, row in containers.numbered(path):
            if row.get("status", "success") == "success" and isinstance(row.get("url"), str):
                yield row["url"], f"{row.get('key')}.jpg"


def _address(name: str) -> bool:
    return "://" in name


def _of_zip(archive: Path) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    for name, info in zipped.Zip(archive).infos.items():
        yield name, (info.header_offset, info.compress_size, info.compress_type, info.file_size)


def _of_tar(archive: Path) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """The files of a tar.

    Raises:
        DataError: it is damaged.
    """
    import tarfile

    try:
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined] # it would keep every one of them
                if info.isreg() and not info.issparse():
                    name = os.path.normpath(info.name)
                    yield name, (info.offset_data, info.size, zipped.STORED, info.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} is damaged or no tar: {error}", hint="fetch it again") from error


class Captions(_OnDisk):
    """Captions of pictures by key or address, out of parquet files; on the disk as an album's names are."""

    def __init__(self, tables: Iterable[Path], column: str, key: str, database: Path) -> None:
        """Read the two columns of every file."""
        super().__init__(database)
        self.rows.execute("create table caption (key text primary key, text text) without rowid")
        for path in tables:
            self.rows.executemany(
                "insert or ignore into caption values (?, ?)", self._pairs(path, column, key)
            )

    def __call__(self, key: Any) -> str | None:
        """The caption of a key; None where there is none."""
        found = self.rows.execute("select text from caption where key = ?", (str(key),)).fetchone()
        return found[0] if found else None

    def _pairs(self, path: Path, column: str, key: str) -> Iterator[tuple[str, str]]:
        for _, row in containers.numbered(path):
            _check_columns(path, row, (column, key))
            if isinstance(row[column], str) and row[key] is not None:
                yield str(row[key]), row[column]


def _check_columns(path: Path, row: Mapping[str, Any], wanted: Iterable[str]) -> None:
    for name in wanted:
        if name not in row:
            raise DataError(
                f"{path} has no column {name!r}, only {', '.join(row)}",
                hint="`column` and `by` of the shape name columns",
            )
