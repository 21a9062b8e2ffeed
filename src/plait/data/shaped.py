"""Raw sources whose records are of a shape: any file of records, with pictures wherever they are.

Lines of JSON and rows of parquet are read where they are linked. Of all else, such as lists of JSON, tars of
samples and records that name pictures, ``records.jsonl`` has a line a record: where it and its pictures lie,
and the pictures' digests. ``index.json`` counts the records of each file. So a shard's job reads its own
stretch of the records and no other, and neither records nor pictures are ever all in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from plait import files
from plait.config.paths import RECORDS, local
from plait.data import albums, containers, fetched, linked, tars, webdataset
from plait.data.chat import ROLES, Sample
from plait.data.lines import RawLine
from plait.data.llava import PICTURES, checked
from plait.data.shapes import shape_of
from plait.data.shapes.common import Shape
from plait.errors import DataError, LeftOut, RecordError

NOTED, INDEX = "records.jsonl", "index.json"
DATABASE = ".names.sqlite"
NOT_DRAWN = object()
"""What stands for a record that `share` leaves out: it need not be read."""


@dataclass(frozen=True)
class Noted:
    """A record, and where its pictures lie; or where a tar has the parts of a sample."""

    record: Any
    places: Sequence[albums.Place | None] = ()
    digests: Sequence[str | None] = ()
    tar: str = ""
    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def whole(self, folder: Path) -> Any:
        """The record, with the parts of its sample."""
        if not self.tar:
            return self.record
        return {**self.record, "parts": tars.parts_at(folder / self.tar, self.parts)}


# Making


def make(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Link the files of a source, and note where its records are.

    Args:
        source: its settings, with ``shape``.
        folder: an empty folder.

    Returns:
        How many records and files there are.

    Raises:
        DataError: it has no file of the kind that the shape is in, or one is damaged.
    """
    shape = shape_of(source["shape"])
    found = MAKERS[shape.holds](source, folder, shape)
    files.write_json(folder / INDEX, {"files": found})
    return {"files": len(found), "records": sum(one["records"] for one in found)}


def check_told(settings: Mapping[str, Any]) -> None:
    """Refuse small files of the user's that were edited since they were planned with.

    Args:
        settings: of a stage; ``told`` has their digests.

    Raises:
        DataError: one was.
    """
    for path, digest in settings.get("told", {}).items():
        if not local(path).is_file() or files.digest(local(path)) != digest:
            raise DataError(f"{path} was changed since this was planned", hint="ask for the target again")


Counted = list[dict[str, Any]]


def _placed(source: Mapping[str, Any], folder: Path) -> list[str]:
    """The names of the source's files, which are linked below ``files``."""
    if source["kind"] != "files":
        return fetched.place(source, folder)
    _refuse_arrow(local(source["path"]))
    names, _ = linked.link(source["path"], folder / fetched.FILES, "files")
    return [f"{fetched.FILES}/{name}" for name in names]


def _refuse_arrow(path: Path) -> None:
    """A folder that Hugging Face `datasets` saved for itself holds small files of JSON that are no records.

    Raises:
        DataError: it is one.
    """
    if any(path.glob("*.arrow")) or any(path.glob("*/*.arrow")):
        raise DataError(
            f"{path} is what `save_to_disk` of Hugging Face `datasets` writes, which is not read",
            hint=f"datasets.load_from_disk({str(path)!r}).to_parquet(FILE.parquet) writes what is; of "
            "several splits each by its name",
        )


def _of(names: Sequence[str], kind: str, source: Mapping[str, Any]) -> list[str]:
    """Those names that are of a kind, of which there is at least one."""
    matches = RECORDS.fullmatch if kind == "records" else (lambda name: name.endswith(f".{kind}"))
    found = [name for name in names if matches(Path(name).name)]
    if not found:
        shape = source["shape"]["name"]
        raise DataError(
            f"none of {', '.join(Path(name).name for name in names[:5])} holds {kind} of shape {shape}",
            hint="name the files that do in `path` or `files` of the source",
        )
    return found


def _count(folder: Path, names: Sequence[str]) -> Counted:
    return [{"file": name, "records": containers.count(folder / name)} for name in names]


def _make_records(source: Mapping[str, Any], folder: Path, shape: Shape) -> Counted:
    names = _placed(source, folder)
    found = _of(names, "records", source)
    apart = any(name.endswith(albums.ARCHIVES) for name in names) or source.get("pictures")
    embedded = all(name.endswith(containers.PARQUET) for name in found) and not apart
    if not any(map(containers.is_list, found)) and (shape.names is None or embedded):
        return _count(folder, found)
    with ExitStack() as stack:
        album = stack.enter_context(_album(source, folder)) if shape.names else None
        out = stack.enter_context((folder / NOTED).open("wb"))
        for name in found:
            for number, content in enumerate(containers.whole(folder / name, shape.inside), start=1):
                _note(out, {"from": [name, number], **_described(content, shape, album)})
    return _count(folder, [NOTED])


def _album(source: Mapping[str, Any], folder: Path) -> albums.Album:
    """The pictures of a source, to which ``pictures`` in its folder leads."""
    given = source.get("pictures")
    if given:
        root = linked.origin(given).resolve()
    elif source["kind"] == "files":
        path = linked.origin(source["path"]).resolve()
        root = path if path.is_dir() else path.parent
    else:
        root = Path(fetched.FILES)
    (folder / PICTURES).symlink_to(root)
    album = albums.Album(folder / PICTURES, folder / DATABASE, deep=bool(given) or source["kind"] != "files")
    album.alias(albums.addresses(folder / PICTURES) if album.inside else ())
    return album


def _described(content: Any, shape: Shape, album: albums.Album | None) -> dict[str, Any]:
    """A record with the places and digests of its pictures; of a line that is no JSON, what is wrong."""
    try:
        record = containers.value(content)
        names = shape.names(record) if shape.names else ()
    except RecordError as error:
        return {"error": str(error), "reason": error.reason}
    if album is None:
        return {"record": record}
    places = [_find(album, name) for name in names]
    digests = [albums.digest(album.root, place) for place in places]
    return {"record": record, "pictures": places, "sha256": digests}


def _find(album: albums.Album, name: Any) -> albums.Place | None:
    """Where a picture lies that may go by several names."""
    for one in name if isinstance(name, list) else [name]:
        try:
            if place := album.place(one.get("path") if isinstance(one, Mapping) else one):
                return place
        except RecordError:
            continue
    return None


def _note(out: BinaryIO, row: dict[str, Any]) -> None:
    """Write down a record; what is wrong with it, where it is nested deeper than json goes."""
    try:
        line = json.dumps(row, separators=(",", ":"))
    except RecursionError:
        line = json.dumps({"from": row["from"], "error": "not JSON: nested too deeply", "reason": "bad_json"})
    except TypeError as error:
        raise DataError(
            f"{row['from'][0]}, record {row['from'][1]}, has in it what JSON has not: {error}",
            hint="pictures that lie in parquet files themselves need no `pictures` and no archives beside",
        ) from error
    out.write(line.encode() + b"\n")


def _make_tars(source: Mapping[str, Any], folder: Path, shape: Shape) -> Counted:  # noqa: ARG001
    names = _placed(source, folder)
    return _note_tars(folder, _of(names, "tar", source), _captions(source["shape"], names, folder), source)


def _captions(chosen: Mapping[str, Any], names: Sequence[str], folder: Path) -> albums.Captions | None:
    """Captions that are to be taken out of parquet files."""
    if not chosen["column"]:
        return None
    place = linked.origin(chosen["metadata"]) if chosen["metadata"] else None
    beside = [folder / name for name in names]
    given = sorted(place.rglob("*")) if place and place.is_dir() else [place] if place else beside
    tables = [path for path in given if path.suffix == containers.PARQUET]
    if not tables:
        raise DataError(
            f"there is no parquet file for the captions of column {chosen['column']!r}",
            hint="`metadata` of the shape names them; without `column` the txt of each sample is taken",
        )
    return albums.Captions(tables, chosen["column"], chosen["by"], folder / DATABASE)


def _note_tars(
    folder: Path, names: Sequence[str], captions: albums.Captions | None, source: Mapping[str, Any]
) -> Counted:
    with ExitStack() as stack:
        out = stack.enter_context((folder / NOTED).open("wb"))
        if captions:
            stack.enter_context(captions)
        for name in names:
            for number, (key, parts) in enumerate(tars.places(folder / name), start=1):
                row: dict[str, Any] = {"from": [name, number], "tar": name, "parts": parts}
                row["record"] = {"key": key}
                if captions:
                    wanted = _url(folder / name, parts) if source["shape"]["by"] == "url" else Path(key).name
                    row["record"]["caption"] = captions(wanted)
                _note(out, row)
    return _count(folder, [NOTED])


def _url(tar: Path, parts: Mapping[str, Sequence[int]]) -> Any:
    """The address in a sample's json; none where there is no such thing."""
    found = tars.parts_at(tar, {"json": parts["json"]}) if "json" in parts else {}
    try:
        row = webdataset.decoded("json", found.get("json"), "")
    except RecordError:
        return None
    return row.get("url") if isinstance(row, dict) else None


def _make_classes(source: Mapping[str, Any], folder: Path, shape: Shape) -> Counted:  # noqa: ARG001
    """Tars of pictures, or a folder of the user's with a folder for each class."""
    root = local(source["path"]) if source["kind"] == "files" else None
    if root is None or not root.is_dir() or any(root.glob("*.tar")):
        return _note_tars(folder, _of(_placed(source, folder), "tar", source), None, source)
    (folder / PICTURES).symlink_to(root.resolve())
    found = sorted(path for path in root.glob("*/*") if path.is_file() and path.suffix)
    if not found:
        raise DataError(
            f"{root} has no tar and no folders of pictures", hint="ImageNet has one for each class"
        )
    with (folder / NOTED).open("wb") as out:
        for path in found:
            name = path.relative_to(root).as_posix()
            digests = [albums.digest(root, [name])]
            row = {"record": {"file": name}, "pictures": [[name]], "sha256": digests}
            _note(out, {"from": [f"{PICTURES}/{name}", 1], **row})
    return _count(folder, [NOTED])


MAKERS: dict[str, Callable[[Mapping[str, Any], Path, Shape], Counted]] = {
    "records": _make_records,
    "tars": _make_tars,
    "classes": _make_classes,
}


def unlisted(source: Mapping[str, Any]) -> frozenset[str]:
    """Archives of pictures: the records have a digest of each picture."""
    if shape_of(source["shape"]).holds != "records":
        return frozenset({PICTURES})
    if source["kind"] == "files":
        return frozenset({PICTURES})
    brought = (Path(file.file).name for file in fetched.brought(source))
    return frozenset({PICTURES, *(name for name in brought if name.endswith(albums.ARCHIVES))})


# Reading


def total(folder: Path) -> int:
    """The records of a raw source."""
    return sum(int(one["records"]) for one in files.read_json(folder / INDEX)["files"])


def bounds(records: int, shard: int, shards: int) -> tuple[int, int]:
    """The first of a shard's records among all, and the one after its last."""
    return records * shard // shards, records * (shard + 1) // shards


def stretch(source: Mapping[str, Any], folder: Path, shard: int, shards: int) -> Iterator[RawLine]:
    """The records of a shard: a stretch of all records in the order of their files.

    Raises:
        DataError: the source is not whole, or a file of the shard's is damaged or was changed since.
    """
    listed = files.read_manifest(folder, kind="raw")["files"]
    counted = files.read_json(folder / INDEX)["files"]
    first, last = bounds(total(folder), shard, shards)
    seen: set[str] = set()
    end = 0
    for one in counted:
        begin, end = end, end + one["records"]
        start, stop = max(first, begin) - begin, min(last, end) - begin
        if start >= stop:
            continue
        _check(folder, one["file"], listed, seen)
        for number, content in containers.numbered(folder / one["file"], start, stop):
            line = RawLine(one["file"], number, begin + number, content)
            if not drawn(line.position, source["share"]):
                line = RawLine(line.file, line.number, line.position, NOT_DRAWN)
            elif one["file"] == NOTED:
                line = _noted(line)
            if isinstance(line.content, Noted) and line.content.tar:
                _check(folder, line.content.tar, listed, seen)
            yield line


def _check(folder: Path, name: str, listed: Mapping[str, Any], seen: set[str]) -> None:
    """Check a linked file when its first record is read; those of other shards are for others to check."""
    if name not in seen and (folder / name).is_symlink():
        linked.check_unchanged(folder / name, listed[name])
    seen.add(name)


def drawn(position: int, share: float) -> bool:
    """Whether a record is in a share of all; that follows from its number alone.

    >>> sum(drawn(position, 0.25) for position in range(1, 1001))
    251
    """
    if share >= 1:
        return True
    digest = hashlib.sha256(str(position).encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _noted(line: RawLine) -> RawLine:
    """A line of ``records.jsonl`` as the record that it notes, or as what is wrong with that."""
    try:
        row = orjson.loads(line.content)
    except orjson.JSONDecodeError as error:  # NaN and half a surrogate pair, which json lets through
        wrong = RecordError(f"not JSON: {error.msg}", reason="bad_json")
        file, number = json.loads(line.content)["from"]
        return RawLine(file, number, line.position, wrong)
    file, number = row["from"]
    if "error" in row:
        return RawLine(file, number, line.position, RecordError(row["error"], reason=row["reason"]))
    places, digests = row.get("pictures", ()), row.get("sha256", ())
    noted = Noted(row["record"], places, digests, row.get("tar", ""), row.get("parts", {}))
    return RawLine(file, number, line.position, noted)


def reader(source: Mapping[str, Any]) -> Callable[[Any, Path], Sample]:
    """What reads a record.

    Raises:
        DataError: the shape is a file of the user's, and none that can be loaded.
    """
    shape = shape_of(source["shape"])

    def read(content: Any, folder: Path) -> Sample:
        if content is NOT_DRAWN:
            raise LeftOut("it is not in the share that is kept", reason="not_drawn")
        if isinstance(content, RecordError):
            raise content
        noted = content if isinstance(content, Noted) else Noted(containers.value(content))
        if shape.rule:
            shape.rule(noted.record)
        return _spoken(shape.read(noted.whole(folder), _pictures(shape, noted, folder)))

    return read


def _spoken(sample: Sample) -> Sample:
    """A sample in which somebody whom we know says something."""
    if not sample.messages:
        raise RecordError("the conversation has no messages", reason="no_messages")
    for number, message in enumerate(sample.messages):
        if message.role not in ROLES:
            sentence = f"message {number} has role {message.role[:40]!r}, expected {', '.join(ROLES)}"
            raise RecordError(sentence, reason="unknown_role")
    return checked(sample)


def _pictures(shape: Shape, noted: Noted, folder: Path) -> list[bytes | None]:
    """A record's pictures, in the order in which the shape names them."""
    names = shape.names(noted.record) if shape.names else ()
    places = noted.places or [None] * len(names)
    digests = noted.digests or [None] * len(names)
    found = [
        _embedded(name) or _read(folder, name, place, digest)
        for name, place, digest in zip(names, places, digests, strict=True)
    ]
    missing = [str(name)[:80] for name, one in zip(names, found, strict=True) if one is None]
    if missing and not shape.skips:
        raise RecordError(f"there is no picture {missing[0]}", reason="missing_picture")
    return found


def _embedded(name: Any) -> bytes | None:
    """The bytes of a picture that is in the record itself, as Hugging Face `datasets` keeps it."""
    found = name.get("bytes") if isinstance(name, Mapping) else name
    return found if isinstance(found, bytes) else None


def _read(folder: Path, name: Any, place: albums.Place | None, wanted: str | None) -> bytes | None:
    """A picture by its place.

    Raises:
        DataError: it was changed since the raw source was made.
    """
    if place is None or wanted is None:
        return None
    encoded = albums.read(folder / PICTURES, place)
    if hashlib.sha256(encoded).hexdigest() != wanted:
        raise DataError(
            f"picture {str(name)[:80]} in {folder / PICTURES} is not what it was when {folder} was made",
            hint=f"remove {folder} and ask for it again",
        )
    return encoded
