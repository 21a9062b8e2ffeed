"""Data that a user has put where plait would write them: checked as the stages would have made them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.config.paths import JSONL, SPLIT
from plait.data import chat, energon, images, meta, probe, shards
from plait.data.lines import read_lines
from plait.errors import DataError, PlaitError, RecordError
from plait.fetch.lfs import refuse_pointers
from plait.foreign import Found
from plait.layout import MANIFEST, Chat, Energon, Raw

PREPARING = ("sample_type", "field_map", "split_parts", "exclude")
"""Energon keys of a dataset that say how tars are prepared, where they are to be not as by default."""
ELSEWHERE = (
    "move the dataset to a folder of your own and name that as a source of kind energon: it is linked, and "
    "prepared anew beside"
)


def check(target: Raw | Chat | Energon, settings: Mapping[str, Any]) -> Found:
    """Check data by the path that they stand at.

    Raises:
        DataError: they are not what the path and the settings say.
    """
    match target:
        case Raw():
            return raw(target, settings)
        case Chat():
            return records(target, settings)
        case Energon():
            return tars(target, settings)


def raw(target: Raw, settings: Mapping[str, Any]) -> Found:
    """Chat records in the folder of a raw source; sources of other kinds have more in it than files.

    Raises:
        DataError: the config names another kind, or there is no such file.
    """
    folder, kind = Path(str(target)), settings["source"]["kind"]
    if kind != "chat-jsonl":
        raise DataError(
            f"{target} is of kind {kind!r} in config/, and only chat records are adopted as a raw source",
            hint=f"move it to a folder of your own and name that in datasets.{target.dataset}.source",
        )
    found = sorted(path for path in folder.rglob("*") if JSONL.fullmatch(path.name) and path.is_file())
    if not found:
        raise DataError(f"{target} has no .jsonl, .jsonl.gz, .jsonl.lz4 or .jsonl.zst")
    refuse_pointers(found)
    names = [path.relative_to(folder).as_posix() for path in found]
    return Found("raw", names, {"linked": len(found), "other_files": 0})


def records(target: Chat, settings: Mapping[str, Any]) -> Found:
    """A shard of chat records: every line is one, with pictures that open.

    Raises:
        DataError: a line is not; it is named. The dataset has no such shard.
    """
    path, counts = Path(str(target)), shards.Counts()
    if target.shard >= settings["shards"]:
        raise DataError(
            f"{target} is beyond the last shard of {target.dataset}, {settings['shards'] - 1:05d}"
        )
    refuse_pointers([path])
    for number, line in read_lines(path):
        try:
            pictures = chat.parse(line).pictures
            for picture in pictures:
                images.open_picture(picture)
        except RecordError as error:
            raise DataError(
                f"{path} line {number}: {error}",
                hint="a shard has no lines but chat records; in a folder of your own, a source of kind "
                "chat-jsonl, such lines are counted and left out",
            ) from error
        counts.read += 1
        counts.kept += 1
        counts.images += len(pictures)
    if not counts.read:
        raise DataError(f"{path} has no record")
    return Found("chat", [], counts.to_json())


def tars(target: Energon, settings: Mapping[str, Any]) -> Found:
    """Webdataset tars, also in folders below: prepared for energon, or, with what that adds, prepared now.

    Raises:
        DataError: a tar is damaged, a picture or key is wrong, or energon reads something else than plait.
    """
    folder, chosen = Path(str(target)), settings["energon"]
    found = energon.shards_below(folder)
    if not found:
        raise DataError(f"{target} has no tar", hint="webdataset tars may also stand in folders below it")
    refuse_pointers(found.values())
    facts = _as_prepared(folder, chosen) if _is_prepared(folder) else _prepare(folder, chosen)
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {MANIFEST, "index.uuid"} and ".git" not in path.parts
    ]
    return Found("energon", names, facts)


def _is_prepared(folder: Path) -> bool:
    """Whether energon has described, counted and split the tars; what it left half done is refused.

    Raises:
        DataError: some of it is there, and some is not.
    """
    lacking = [name for name in (meta.DATASET, meta.INFO, SPLIT) if not (folder / name).is_file()]
    left = [folder / meta.META] * (folder / meta.META).exists() or [*folder.rglob("*.tar.idx")]
    if lacking and left:
        raise DataError(
            f"{folder} has {left[0].relative_to(folder)} and no {lacking[0]}: it is half prepared, or by an "
            "older energon",
            hint="run `energon prepare` in it to the end, or remove what it left",
        )
    return not lacking


def _prepare(folder: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Let energon write its indexes beside tars that have none; they go again if it cannot."""
    fields = {"image": "jpg,png", **energon.FIELDS[chosen["layout"]]}
    description = meta.modern({"__class__": meta.CRUDE, "field_map": fields}, folder, chosen)
    survey = energon.surveyed(folder, chosen, description)
    survey.refuse_rejects()
    try:
        return energon.prepared(folder, survey.counts, chosen, description)
    except PlaitError:
        energon.clean(folder)
        raise


def _as_prepared(folder: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Read a prepared dataset through energon as it stands."""
    unheeded = [key for key in PREPARING if chosen[key]]
    if unheeded:
        raise DataError(
            f"{folder} is prepared already, and {', '.join(unheeded)} of its energon keys would change that",
            hint=f"leave them out, or {ELSEWHERE}",
        )
    description = meta.read_yaml(folder / meta.DATASET)
    if meta.modern(description, folder, chosen) != _plain(description):
        raise DataError(
            f"{folder / meta.DATASET} is of an older energon than reads it here, and nothing of yours is "
            "changed",
            hint=ELSEWHERE,
        )
    survey = energon.surveyed(folder, chosen, description, meta.read_split(folder / SPLIT))
    survey.refuse_rejects()
    counts = survey.counts
    answer = probe.run(folder, probe.AS_IT_IS)
    wrong = answer.get("failed") or answer["wrong"]
    if wrong:
        raise DataError(
            f"energon cannot read {folder} as it is described: {wrong}",
            hint=f"look at {folder / meta.DATASET} and run `energon prepare` again",
        )
    return {"samples": sum(counts.values()), "shards": counts, "splits": answer["splits"]}


def _plain(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description without keys that energon takes at their default."""
    return {key: value for key, value in description.items() if value not in (None, [], {})}
