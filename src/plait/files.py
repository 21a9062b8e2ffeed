"""Files that appear whole or not at all, their digests, and the manifest of a folder.

A manifest ``plait.json`` is written last and is what other stages depend on. It says what the
artifact is, the digests of its files and of its inputs, and the settings and stage version that
made it. It holds no time, host or absolute path: an equal rebuild gives an equal manifest.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from plait.errors import DataError, LayoutError, PlaitError
from plait.layout import (
    ADOPTABLE,
    MANIFEST,
    PRUNED,
    Artifact,
    Batch,
    Chat,
    Export,
    HubFile,
    Run,
    parse,
    proof_of,
)

SCHEMA = 1
ADOPTED = b'"adopted"'
PART = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)@(?P<host>.+)\.part")
"""What is being written, and by which process of which machine: a killed one leaves it behind."""
SNAKEMAKE_LEFTOVERS = {".snakemake_timestamp"}
OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that only what writes can have: no space, a quota, a file too large, a read-only place."""

log = logging.getLogger(__name__)


def digest(path: Path | str) -> str:
    """The sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_input(path: Path | str) -> str:
    """What stands for an input in a manifest: its manifest's digest, or its own if it is a file."""
    path = Path(path)
    return digest(path / MANIFEST if path.is_dir() else path)


def digest_now(path: str) -> str | None:
    """The digest that a manifest has for an input, from what is beside it; None where that is not there."""
    chat = Chat.read(path)
    manifest = Path(chat.manifest if chat else f"{path}/{MANIFEST}")
    if not manifest.is_file():
        return None
    if chat is None:
        return _digest_of(manifest, manifest.stat().st_mtime_ns)
    found: str | None = read_json(manifest).get("sha256")
    return found


@cache
def _digest_of(path: Path, _changed: int) -> str:
    """The digest of a small file that many are made from."""
    return digest(path)


def stands(artifact: Artifact, settings: Mapping[str, Any], inputs: Iterable[Path | str]) -> bool:
    """Whether a shard is there, made with these settings from these inputs; its bytes are not read."""
    if not Path(artifact.manifest).is_file():
        return False
    found = read_json(artifact.manifest)
    listed_ = found.get("files") or {"": {"bytes": found.get("bytes")}}
    return bool(
        canonical(found.get("settings")) == canonical(settings)
        and found["inputs"] == {os.path.relpath(path): digest_of_input(path) for path in inputs}
        and all(_has_size(Path(str(artifact), name), entry["bytes"]) for name, entry in listed_.items())
    )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def write_batch(batch: Batch, settings: Mapping[str, Any], inputs: Iterable[Path | str]) -> None:
    """Say that all shards of a batch are there; other batches that have some of them say so no more."""
    folder = Path(batch.manifest).parent
    for path in folder.glob("*.json"):
        other = parse(path)
        if other.first <= batch.last and batch.first <= other.last and other != batch:
            path.unlink()
    written = {
        "schema": SCHEMA,
        "kind": "batch",
        "settings": settings,
        "inputs": {os.path.relpath(path): digest_of_input(path) for path in inputs},
        "shards": {str(one): digest(one.manifest) for one in batch.shards},
    }
    write_json(batch.manifest, written)


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path | str, value: Any) -> None:
    """Write readable, deterministic JSON, whole or not at all."""
    with appears_whole(path) as part:
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
        part.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read JSON.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def read_object(path: Path | str) -> dict[str, Any]:
    """Read a JSON object, as every config of a model is one.

    Raises:
        DataError: the file is missing, is not JSON, or holds another kind of value.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(
            f"{path} holds a JSON {type(found).__name__}, expected an object with keys",
            hint="download or write the file anew",
        )
    return found


def made_by_plait(target: Path, marks: Iterable[str] = (MANIFEST,)) -> bool:
    """Whether replacing what stands at this path loses nothing that plait did not make.

    Args:
        target: the path of an artifact that is a folder.
        marks: files by which plait knows a folder of its own; any of them is enough.
    """
    if target.is_symlink() or not target.is_dir():
        return target.is_file() or not os.path.lexists(target)
    if any((target / mark).is_file() for mark in marks):
        return not _adopted(target / MANIFEST)
    return {path.name for path in target.iterdir()} <= SNAKEMAKE_LEFTOVERS


def foreign(artifact: Artifact) -> Path | None:
    """What stands at an artifact's path and was not made by plait."""
    target = Path(str(artifact))
    if isinstance(artifact, Chat):
        # The rejects are there before the shard is, so a killed stage leaves a shard that is still known.
        marks = (Path(artifact.manifest), Path(artifact.rejects))
        known = any(mark.is_file() for mark in marks) and not adopted(artifact)
        return target if os.path.lexists(target) and not known else None
    if isinstance(artifact, Run) or (isinstance(artifact, HubFile) and not target.is_dir()):
        return None
    return None if made_by_plait(target, artifact.MARKS) else target


def refuse_foreign(target: Path | Artifact) -> None:
    """Refuse to write where something stands that plait did not make.

    Args:
        target: the path of a folder, or an artifact.

    Raises:
        LayoutError: it names what stands there.
    """
    stands = foreign(target) if isinstance(target, Artifact) else None if made_by_plait(target) else target
    if stands is not None and (stands / MANIFEST).is_file():
        raise LayoutError(f"{stands} was adopted, and nothing is made in its place", hint="move it away")
    if stands is not None:
        raise LayoutError(
            f"{stands} stands where plait would write, and plait did not make it",
            hint=f"{_taken(stands)}move it away, or name it in config/ as the source of another artifact",
        )


def _taken(stands: Path) -> str:
    """How it is taken as made, if it can be."""
    try:
        can_be = isinstance(parse(stands), ADOPTABLE)
    except LayoutError:
        can_be = False
    return f"`plait adopt {stands}` checks it and takes it as it is; or " if can_be else ""


def adopted(artifact: Artifact) -> dict[str, Any] | None:
    """The manifest of what stands at an artifact's path, where ``plait adopt`` wrote it; None otherwise."""
    path = Path(artifact.manifest)
    return _adopted(path) if path.suffix == ".json" else None


def _adopted(path: Path) -> dict[str, Any] | None:
    """The manifest at a path, if it says so; of most it is enough to know that the word is not in them."""
    if not path.is_file() or ADOPTED not in path.read_bytes():
        return None
    manifest: dict[str, Any] = read_json(path)
    return manifest if manifest.get("adopted") else None


def linkable(export: Export) -> str:
    """The path of an export whose short form may be linked to it.

    Raises:
        LayoutError: what stands at the short form is no link; it is named.
    """
    short = Path(export.short)
    if os.path.lexists(short) and not short.is_symlink():
        raise LayoutError(
            f"{short} stands where plait would put a link to {export}, and plait did not make it",
            hint=f"move it away, or ask for {export}",
        )
    return str(export)


def sizes(source: Path | str, names: re.Pattern[str]) -> dict[str, int]:
    """How many bytes the files of a source have, without opening them.

    Args:
        source: a file or a folder, as the user wrote it; "" and one that is not there have no files.
        names: what the name of a file must match whole.

    Returns:
        Bytes by path, relative to the folder; a file that is a source itself goes by its name.
    """
    if source == "":
        return {}
    source = Path(source).expanduser()
    base, found = (source, source.rglob("*")) if source.is_dir() else (source.parent, [source])
    wanted = sorted(path for path in found if names.fullmatch(path.name) and path.is_file())
    return {path.relative_to(base).as_posix(): path.stat().st_size for path in wanted}


@contextlib.contextmanager
def appears_whole(target: Path | str, *, folder: bool = False) -> Iterator[Path]:
    """Give a path beside the target to write to; rename it into place if nothing went wrong.

    What a killed process of this machine left of the same target is removed first.

    Raises:
        LayoutError: a folder that plait did not make stands at the target.
        OSError: it cannot be written; the target is named.
    """
    target = Path(target)
    if folder:
        refuse_foreign(target)
    part = _beside(target, target.name)
    with _told_by(target, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        try:
            if folder:
                part.mkdir()
            yield part
            sync(part)
            _put(part, target)
            sync(target.parent, deep=False)
        finally:
            remove(part)


def _beside(target: Path, name: str) -> Path:
    """What this process writes under a name beside a target."""
    return target.with_name(f".{name}.{os.getpid()}@{os.uname().nodename}.part")


def _put(part: Path, target: Path) -> None:
    """Rename to the target; a folder that stands there is moved aside first, and never half removed."""
    if not target.is_dir():
        part.replace(target)
        return
    old = _beside(target, f"{target.name}.old")
    target.replace(old)
    try:
        part.replace(target)
    except OSError:
        old.replace(target)
        raise
    remove(old)


def _clear(target: Path) -> None:
    """Remove what processes of this machine left of a target that are gone; name what others may write."""
    names = {target.name, f"{target.name}.old"}
    for path in sorted(target.parent.iterdir()):
        found = PART.fullmatch(path.name)
        if not found or found["name"] not in names:
            continue
        here, alive = found["host"] == os.uname().nodename, Path(f"/proc/{found['pid']}").exists()
        if here and (not alive or int(found["pid"]) == os.getpid()):
            log.info("%s is removed: a process that was killed left it", path)
            remove(path)
        else:
            log.warning("%s is written by process %s on %s, or was left by it", path, *found.group(2, 3))


@contextlib.contextmanager
def _told_by(target: Path, part: Path) -> Iterator[None]:
    """Name the target where an error names what is written beside it: a user knows no other name."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or "")
        if name.startswith(str(part)):
            error.filename = str(target) + name.removeprefix(str(part))
        elif not name and error.errno in OF_WRITING:
            error.filename = str(target)
        raise
    except PlaitError as error:
        named = (part.name, target.name)
        error.args = tuple(str(told).replace(*named) for told in error.args)
        error.hint = error.hint.replace(*named)
        raise


@contextlib.contextmanager
def temporary() -> Iterator[None]:
    """Where a temporary file cannot be written, the folder of such is named: they have no names."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or tempfile.gettempdir()
        raise


@contextlib.contextmanager
def appears_once(target: Path) -> Iterator[Path]:
    """Give a folder beside the target to write to; it becomes the target where no other process was faster.

    One rename decides, so that nobody waits for anybody: the others' folders are removed.
    """
    part = _beside(target, target.name)
    with _told_by(target, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        try:
            part.mkdir()
            yield part
            sync(part)
            try:
                part.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            sync(target.parent, deep=False)
        finally:
            remove(part)


def link(source: Path | str, place: Path) -> None:
    """Link to a file of this project by the way from here to there: the project may be moved."""
    source = Path(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    there = os.path.relpath(source.parent.resolve(), place.parent.resolve())
    place.symlink_to(Path(there) / source.name)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def drop(folder: Path) -> None:
    """Remove a folder, if it is there; whoever is killed meanwhile leaves no half of it by its name."""
    if os.path.lexists(folder):
        gone = folder.with_name(f".{folder.name}.gone.part")
        remove(gone)
        remove(folder.rename(gone))


def sync(path: Path, *, deep: bool = True) -> None:
    """Make a file, or a folder and all in it, durable."""
    found = [path, *sorted(path.rglob("*"))] if deep and path.is_dir() else [path]
    for entry in found:
        if entry.is_symlink():
            continue
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_manifest(
    folder: Path,
    *,
    kind: str,
    settings: Mapping[str, Any],
    inputs: Iterable[Path | str] | Mapping[str, str] = (),
    facts: Mapping[str, Any] | None = None,
    unlisted: frozenset[str] = frozenset(),
    known: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the manifest of a folder that is whole but for it.

    Args:
        folder: the folder; every file in it is listed and digested but those in ``unlisted``.
        kind: what the artifact is, e.g. ``indexed``.
        settings: the config slice and stage version that made it.
        inputs: the artifacts it was made from, by path as the user knows them; their digests where given.
        facts: counts and roots worth reading without opening the artifact.
        unlisted: names of files made for people only: another look of theirs changes nothing.
        known: what is listed of files whose bytes were digested while they were written.
    """
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {MANIFEST, *unlisted}
    ]
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "settings": settings,
        "inputs": dict(inputs)
        if isinstance(inputs, Mapping)
        else {os.path.relpath(path): digest_of_input(path) for path in inputs},
        "files": listed(folder, names, known or {}),
        "facts": dict(facts or {}),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def listed(
    folder: Path, names: Iterable[str], known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """The files of a folder as its manifest has them; those that are known already are not read."""
    return {
        name: known.get(name) or {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in names
    }


def read_manifest(folder: Path | str, *, kind: str = "") -> dict[str, Any]:
    """Read the manifest of an artifact.

    Raises:
        DataError: there is none, it is of a newer schema, or of another kind.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it is not whole, or plait did not make it")
    manifest: dict[str, Any] = read_json(path)
    if manifest.get("schema") != SCHEMA:
        raise DataError(f"{path} has schema {manifest.get('schema')}; this plait reads {SCHEMA}")
    if kind and manifest["kind"] != kind:
        raise DataError(f"{folder} is of kind {manifest['kind']!r}, expected {kind!r}")
    return manifest


def stamp(folder: Path | str) -> dict[str, str]:
    """What the facts of all that is made of a model say, where it is proven by bytes alone: how it is.

    Args:
        folder: the model; its manifest says it of what it comes from, its proof of itself.
    """
    proof = read_json(proof_of(folder)) if Path(proof_of(folder)).is_file() else {}
    known = read_manifest(folder)["facts"] if (Path(folder) / MANIFEST).is_file() else {}
    return {"proof": "bytes"} if "bytes" in (proof.get("proof"), known.get("proof")) else {}


def prune(folder: Path, names: Iterable[str], why: str) -> None:
    """Remove files of an artifact that is otherwise whole; its manifest stays, so nothing is made again."""
    before = pruned(folder)
    gone = dict.fromkeys(names, why) | before
    if gone.keys() != before.keys():
        write_json(folder / PRUNED, gone)
    for name in gone:
        (folder / name).unlink(missing_ok=True)


def pruned(folder: Path | str) -> dict[str, str]:
    """The files of an artifact that were removed on purpose, each with the key that asked for it."""
    path = Path(folder) / PRUNED
    return dict(read_object(path)) if path.is_file() else {}


def check_manifest(folder: Path | str) -> dict[str, Any]:
    """Compare every file of an artifact with its manifest, but for those that were removed on purpose.

    Raises:
        DataError: a file is missing, has another size or other bytes; it is named.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        try:
            if name not in pruned(folder):
                check_file(Path(folder) / name, entry)
        except (DataError, OSError):
            if name not in pruned(folder):  # it may have been removed meanwhile
                raise
    return manifest


def check_file(path: Path, entry: Mapping[str, Any], *, deep: bool = True, record: str = MANIFEST) -> None:
    """Compare a file with what a manifest lists of it; its bytes only where ``deep``.

    Args:
        path: the file.
        entry: its ``bytes`` and ``sha256``.
        deep: whether its bytes are read.
        record: the name of what lists it.

    Raises:
        DataError: it is missing, has another size or other bytes.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; {record} lists it")
    if path.stat().st_size != entry["bytes"]:
        raise DataError(f"{path} has {path.stat().st_size} bytes, {record} says {entry['bytes']}")
    if deep and digest(path) != entry["sha256"]:
        raise DataError(f"{path} does not have the sha256 that {record} records")
