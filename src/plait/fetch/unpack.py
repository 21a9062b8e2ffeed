"""Archives of strangers, unpacked: only files and folders, only inside, only so much."""

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from plait.errors import DataError

ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
CHUNK = 1 << 20
ENCRYPTED = 0x1
HINT = "unpack it yourself where you can look at it, and name the folder as `path` of a source"


@dataclass(frozen=True)
class Limits:
    """How much an archive may become."""

    bytes: int
    files: int


@dataclass(frozen=True)
class _Member:
    name: str
    open: Callable[[], IO[bytes] | None]
    what: str = ""
    """What it is if it is no plain file; empty for a file."""


def is_archive(name: str) -> bool:
    """Whether a file of this name is one that can be unpacked."""
    return name.lower().endswith(ENDINGS)


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool], limits: Limits) -> list[str]:
    """Unpack the wanted files of an archive; their names.

    Hidden files, and those that macOS puts beside others, are left out.

    Raises:
        DataError: the archive is damaged, larger than the limits, or has a link, a device or a name that
            leads out of the folder, whether wanted or not; or one name twice.
    """
    done: list[str] = []
    left = limits.bytes
    with _in_a_sentence(archive), _opened(archive) as members:
        for number, member in enumerate(members, start=1):
            if number > limits.files:
                raise DataError(f"{archive} has more than {limits.files:,} members", hint="raise `max_files`")
            name = _checked(archive, member)
            if member.what == "folder" or not wanted(name) or _hidden(name):
                continue
            left -= _write(member, folder / name, left)
            if left < 0:
                limit = f"{limits.bytes / 1e9:g} GB"
                raise DataError(f"{archive} unpacks to more than {limit}", hint="raise `max_unpacked_gb`")
            done.append(name)
    return done


def _checked(archive: Path, member: _Member) -> str:
    """The name of a member, relative and plain."""
    path = PurePosixPath(member.name)
    out = path.is_absolute() or ".." in path.parts or PureWindowsPath(member.name).drive
    if out or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{archive} has the member {member.name!r}, which leads out of its folder", hint=HINT)
    if member.what not in ("", "folder"):
        raise DataError(f"{archive} has the member {member.name!r}, which is a {member.what}", hint=HINT)
    return path.as_posix()


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _write(member: _Member, place: Path, most: int) -> int:
    """Write a member, but no more than one chunk too much; its bytes as they were, not as it says."""
    place.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    source = member.open()
    assert source is not None  # a regular file has content
    with source, place.open("xb") as file:
        while size <= most and (content := source.read(CHUNK)):
            size += file.write(content)
    return size


@contextmanager
def _opened(archive: Path) -> Iterator[Iterator[_Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield _of_zip(opened)
    else:
        with tarfile.open(archive, "r:*") as tar:
            yield _of_tar(tar)


def _of_zip(opened: zipfile.ZipFile) -> Iterator[_Member]:
    for info in opened.infolist():
        mode = stat.S_IFMT(info.external_attr >> 16)
        what = "folder" if info.is_dir() else "" if mode in (0, stat.S_IFREG) else "link or device"
        what = "file with a password" if info.flag_bits & ENCRYPTED else what
        yield _Member(info.filename, lambda info=info: opened.open(info), what)  # type: ignore[misc]


def _of_tar(tar: tarfile.TarFile) -> Iterator[_Member]:
    for info in tar:
        what = "" if info.isreg() else "folder" if info.isdir() else "link or device"
        yield _Member(info.name, lambda info=info: tar.extractfile(info), what)  # type: ignore[misc]


@contextmanager
def _in_a_sentence(archive: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise DataError(f"{archive} has {Path(error.filename).name} twice", hint=HINT) from error
    except NotADirectoryError as error:
        raise DataError(f"{archive} has a file where it has a folder too", hint=HINT) from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{archive} is damaged or no archive: {error}", hint="fetch it again") from error
    except NotImplementedError as error:
        raise DataError(f"{archive} is packed in a way that is not read: {error}", hint=HINT) from error
