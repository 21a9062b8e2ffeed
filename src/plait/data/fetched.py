"""Raw sources that come as files from the hub or a URL: linked, unpacked, or parquet written as jsonl."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from plait import files
from plait.config.paths import JSONL, NAMES
from plait.data.albums import ARCHIVES
from plait.data.containers import PARQUET, numbered
from plait.errors import DataError
from plait.fetch.lfs import refuse_pointers
from plait.layout import HubFile

if TYPE_CHECKING:
    from plait.fetch.unpack import Limits

FILES = "files"
"""Where they lie in a raw source, so that no name of a stranger's meets one of ours."""
LIMITS = {"bytes": 200 * 10**9, "files": 2_000_000}
"""Of archives of the hub; a URL has its own in config/."""

log = logging.getLogger(__name__)


def brought(source: Mapping[str, Any]) -> list[HubFile]:
    """The files that a source comes as, all of them whole.

    Raises:
        DataError: it is not locked, or a file is not fetched.
    """
    from plait.config.hub import HubData, UrlData
    from plait.config.lock import Lock

    settings = (HubData if source["kind"] == "hub" else UrlData).model_validate(source)
    found = Lock().files(settings, "datasets")
    if found is None and isinstance(settings, HubData):
        raise DataError(f"{settings.tree.key} is not locked", hint="plait lock")
    for file in found or ():
        checked = files.read_json(file.manifest)
        if not Path(str(file)).is_file() or Path(str(file)).stat().st_size != checked["bytes"]:
            raise DataError(
                f"{file} is not the file that was fetched", hint=f"remove it, then plait fetch {file}"
            )
    refuse_pointers(Path(str(file)) for file in found or ())
    return found or []


def place(source: Mapping[str, Any], folder: Path) -> list[str]:
    """Put what a source comes as into the folder of the raw source; the names of the files there.

    A zip of pictures stays a zip; for shapes, zips and tars stay what they are.
    """
    from plait.fetch.unpack import Limits, is_archive

    limits = Limits(**LIMITS)
    if "max_files" in source:
        limits = Limits(bytes=source["max_unpacked_gb"] * 10**9, files=source["max_files"])
    names: list[str] = []
    inner = folder / FILES
    for file in brought(source):
        path = Path(str(file))
        if source["shape"] and (path.suffix in ARCHIVES or not is_archive(path.name)):
            files.link(path, inner / file.file)
            names.append(file.file)
            continue
        pictures = source["as_kind"] == "llava-json" and path.suffix == ".zip" and source["kind"] == "hub"
        webdataset = source["as_kind"] == "tars" and path.suffix == ".tar"
        if path.suffix == PARQUET and source["as_kind"] == "chat-jsonl":
            names.append(_as_jsonl(path, inner, file.file))
        elif is_archive(path.name) and not pictures and not webdataset:
            names += _unpacked(path, inner, "" if source["shape"] else source["as_kind"], limits)
        else:
            files.link(path, inner / file.file)
            names.append(file.file)
    return sorted(f"{FILES}/{name}" for name in names)


def _unpacked(path: Path, folder: Path, kind: str, limits: "Limits") -> list[str]:
    """What an archive has of a kind; of a LLaVA json, and for shapes, everything, pictures too.

    Raises:
        DataError: it has none.
    """
    from plait.fetch.unpack import unpack

    found = unpack(
        path,
        folder,
        lambda name: kind in ("", "llava-json") or bool(NAMES[kind].fullmatch(Path(name).name)),
        limits,
    )
    if not found:
        raise DataError(f"{path} has no files of the kind {kind}", hint="`as_kind` says how files are read")
    log.info("%s: %d files unpacked", path.name, len(found))
    return found


def _as_jsonl(path: Path, folder: Path, name: str) -> str:
    """Write the rows of a parquet file as lines of JSON; the name of the file.

    Raises:
        DataError: it is no parquet file, or has what JSON has not.
    """
    written = str(Path(name).with_suffix(".jsonl"))
    (folder / written).parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with (folder / written).open("xb") as lines:
        for _, row in numbered(path):
            try:
                lines.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            except TypeError as error:
                raise DataError(f"{path}, row {count + 1}, cannot be a chat record: {error}") from error
            count += 1
    log.info("%s: %d rows", name, count)
    return written


def facts(folder: Path, names: list[str]) -> dict[str, Any]:
    """Figures of a source of chat records.

    Raises:
        DataError: no file has such records.
    """
    found = [name for name in names if JSONL.fullmatch(Path(name).name)]
    if not found:
        raise DataError(
            f"{folder} holds no chat records, only {', '.join(names[:5])}",
            hint="`as_kind` says how the files are read: chat-jsonl, llava-json or tars",
        )
    return {"files": len(found), "other_files": len(names) - len(found)}
