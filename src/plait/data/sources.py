"""Raw sources: for each kind in config/, how it is made and how its lines are read.

A raw source is a folder of jsonl files, plain or compressed, with whatever their lines point to.
To add a kind: a class in ``config/model.py`` and a row in :data:`KINDS`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from msgspec.structs import replace

from plait import files
from plait.config.paths import JSONL, NAMES
from plait.data import builtin, chat, fetched, linked, llava, meta, shaped, tars, webdataset
from plait.data.lines import RawLine, read_lines
from plait.errors import DataError, RecordError
from plait.fetch.lfs import refuse_pointers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """One kind of raw source."""

    make: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    """Fills the folder from the source's settings and gives the facts worth recording."""
    read: Callable[[bytes, Path], chat.Sample]
    """Reads one line; the folder is where the line's pictures are. Raises RecordError."""


# Making


def make(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fill the folder of a raw source.

    Args:
        source: ``datasets.*.source`` of the config.
        folder: an empty folder.

    Returns:
        Facts for the manifest, such as counts.
    """
    return KINDS[source["kind"]].make(source, folder)


def link(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Link the jsonl files that the user has somewhere; their digests go into the manifest.

    Raises:
        DataError: there is no such path, or no jsonl file in it.
    """
    wanted, others = linked.link(source["path"], folder, source["kind"])
    return {"linked": len(wanted), "other_files": others}


def link_tars(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Link webdataset tars and note where each sample's parts lie: a line a sample.

    Raises:
        DataError: there is no such path, no tar in it, or a tar is damaged.
    """
    wanted, others = linked.link(source["path"], folder, source["kind"])
    return {"linked": len(wanted), "other_files": others, **_note_places(wanted, folder)}


def _note_places(names: list[str], folder: Path) -> dict[str, Any]:
    unique, samples = llava.Unique(), 0
    with (folder / builtin.RECORDS).open("wb") as records:
        for path in names:
            for key, parts in tars.places(folder / path):
                row = {"tar": path, "key": key, "id": unique(key), "parts": parts}
                records.write(orjson.dumps(row) + b"\n")
                samples += 1
    return {"samples": samples, "renamed": unique.renamed}


def link_llava(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write a LLaVA json as one line a record, beside a link to the folder of its pictures.

    Raises:
        DataError: the json or the folder is not there, or the json is no list.
    """
    path = linked.origin(source["path"])
    refuse_pointers([path])
    pictures = linked.origin(source["images"]) if source["images"] else path.parent
    if not pictures.is_dir() and pictures.suffix != ".zip":
        raise DataError(
            f"{pictures} is no folder and no zip", hint="`images` names where a LLaVA json's pictures are"
        )
    (folder / llava.PICTURES).symlink_to(pictures.resolve())
    return _write_llava(path, folder)


def _write_llava(path: Path, folder: Path) -> dict[str, Any]:
    unique, count = llava.Unique(), 0
    with (folder / builtin.RECORDS).open("wb") as lines:
        for line in llava.rows(path, folder / llava.PICTURES, unique):
            lines.write(line)
            count += 1
    return {"records": count, "renamed": unique.renamed}


def link_energon(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Link the tars of a dataset that energon prepared, and its description.

    Raises:
        DataError: it is not there, or is not prepared.
    """
    wanted, others = linked.link(source["path"], folder, source["kind"])
    if meta.DATASET not in wanted:
        hint = "`energon prepare` makes it; tars without it are a source of kind tars"
        raise DataError(f"{source['path']} has no {meta.DATASET}", hint=hint)
    return {"linked": len(wanted), "other_files": others}


def fetched_source(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read what came from the hub or a URL as a source of its ``as_kind``.

    Raises:
        DataError: it holds no such source.
    """
    if source["shape"]:
        return shaped.make(source, folder)
    names = fetched.place(source, folder)
    if source["as_kind"] == "tars":
        return _note_places([name for name in names if name.endswith(".tar")], folder)
    if source["as_kind"] == "chat-jsonl":
        return fetched.facts(folder, names)
    lists = [name for name in names if NAMES["llava-json"].fullmatch(Path(name).name)]
    zips = [name for name in names if name.endswith(".zip")]
    if len(lists) != 1 or len(zips) > 1:
        raise DataError(
            f"a LLaVA json is one json and at most one zip of pictures, not {len(lists)} and {len(zips)}",
            hint="name them in `files` of the source",
        )
    pictures = zips[0] if zips else str(Path(lists[0]).parent)
    (folder / llava.PICTURES).symlink_to(pictures)
    return _write_llava(folder / lists[0], folder)


def inputs(source: Mapping[str, Any]) -> list[str]:
    """The files that stand for what a raw source was made from in its manifest."""
    return [file.manifest for file in fetched.brought(source)] if source["kind"] in AFAR else []


def unlisted(source: Mapping[str, Any]) -> frozenset[str]:
    """Zips of pictures: the records have a digest of each, and every shard would read the whole zip again."""
    if source.get("shape"):
        return shaped.unlisted(source)
    if source.get("as_kind", source["kind"]) != "llava-json":
        return frozenset()
    zips = [Path(file.file).name for file in fetched.brought(source)] if source["kind"] == "hub" else []
    return frozenset({llava.PICTURES, *(name for name in zips if name.endswith(".zip"))})


def reader(source: Mapping[str, Any]) -> Callable[[Any, Path], chat.Sample]:
    """What reads a line of a source."""
    if source.get("shape"):
        return shaped.reader(source)
    return KINDS[source["as_kind"] if source["kind"] in AFAR else source["kind"]].read


def supplied(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Nobody can make this source but the user.

    Raises:
        DataError: always; it says what is wanted.
    """
    raise DataError(
        f"the data of {folder} must be supplied by you: {source['what']}",
        hint="give the dataset another `source` in your config: a path to what you have",
    )


# Reading


def read(folder: Path | str) -> Iterator[RawLine]:
    """Every line of a raw source, file after file; blank lines too.

    Raises:
        DataError: the source is not whole, or a file is damaged or was changed since it was made.
    """
    folder = Path(folder)
    manifest = files.read_manifest(folder, kind="raw")
    position = 0
    lines = [name for name in manifest["files"] if JSONL.fullmatch(Path(name).name)]
    for name, entry in manifest["files"].items():
        if name in lines or (folder / name).is_symlink():
            linked.check_unchanged(folder / name, entry)
    for name in lines:
        for number, content in read_lines(folder / name):
            position += 1
            yield RawLine(file=name, number=number, position=position, content=content)


class Share:
    """The lines of one shard of a raw source; every line is in one.

    Attributes:
        lines: lines of the whole source, once the share was read.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any], shard: int, shards: int) -> None:
        """Have a shard's share, which ``source`` of the config says how to read."""
        self.folder, self.source, self.shard, self.shards = folder, source, shard, shards
        self.lines = 0

    def __iter__(self) -> Iterator[RawLine]:
        """Its lines, blank ones too.

        Raises:
            DataError: as :func:`read`.
        """
        if self.source.get("shape"):
            yield from shaped.stretch(self.source, self.folder, self.shard, self.shards)
            self.lines = shaped.total(self.folder)
            return
        self.lines = 0
        for line in read(self.folder):
            if self.lines % self.shards == self.shard:
                yield line
            self.lines += 1

    @property
    def own(self) -> int:
        """Lines that are in it, by the count of all."""
        if self.source.get("shape"):
            first, last = shaped.bounds(self.lines, self.shard, self.shards)
            return last - first
        return len(range(self.shard, self.lines, self.shards))


def read_chat(line: bytes, folder: Path) -> chat.Sample:  # noqa: ARG001
    """A line that is a chat record already."""
    return chat.parse(line)


def read_captioned(line: bytes, folder: Path) -> chat.Sample:
    """A row ``{"id", "picture", "caption"}`` as SOLO has captions: a bare assistant turn, picture first.

    Raises:
        RecordError: the row lacks a key or its picture file is missing.
    """
    try:
        row = orjson.loads(line)
        encoded = (folder / row["picture"]).read_bytes()
        parts = (chat.Picture(encoded), chat.Text(row["caption"]))
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error}", reason="bad_json") from error
    except (KeyError, TypeError) as error:
        raise RecordError(f"not a row with picture and caption: {error}", reason="not_a_record") from error
    except OSError as error:
        raise RecordError(f"picture cannot be read: {error}", reason="missing_picture") from error
    return chat.Sample(id=row.get("id", ""), messages=(chat.Message("assistant", parts),))


def read_places(line: bytes, folder: Path) -> chat.Sample:
    """A sample of a linked tar.

    Raises:
        RecordError: it is of neither layout.
    """
    row = orjson.loads(line)
    parts = tars.parts_at(folder / row["tar"], row["parts"])
    return replace(llava.checked(webdataset.to_sample(parts, row["key"])), id=row["id"])


AFAR = {"hub", "url"}
"""Kinds that are read as another: their ``as_kind``."""
KINDS: dict[str, Kind] = {
    "emoji-captions": Kind(make=builtin.emoji_captions, read=read_captioned),
    "chatterbot-dialogues": Kind(make=builtin.chatterbot_dialogues, read=read_chat),
    "chat-jsonl": Kind(make=link, read=read_chat),
    "llava-json": Kind(make=link_llava, read=llava.read),
    "tars": Kind(make=link_tars, read=read_places),
    "energon": Kind(make=link_energon, read=read_chat),
    "files": Kind(make=shaped.make, read=read_chat),
    "hub": Kind(make=fetched_source, read=read_chat),
    "url": Kind(make=fetched_source, read=read_chat),
    "you-supply": Kind(make=supplied, read=read_chat),
}
