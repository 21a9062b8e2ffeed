"""What every stage rejected on the way to a mixture: counts by reason, and some of the lines themselves."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from plait import files, layout
from plait.data.rejects import NAME

EXAMPLES = 3
"""Rejected lines that are quoted for each reason of a stage."""
LONGEST = 300
"""Characters of a quoted sentence."""

Row = dict[str, Any]
"""A stage's ledger: ``stage``, ``read``, ``kept``, ``rejected``, ``blank``; count and examples by reason."""


def stages(folders: Sequence[Path]) -> list[Row]:
    """The ledgers of the stages that made a dataset, from raw lines on.

    Args:
        folders: packed shards of it, or an energon dataset; their manifests name what they were made from.
    """
    manifests = [files.read_manifest(folder) for folder in folders]
    made_from = dict.fromkeys(path for manifest in manifests for path in manifest["inputs"])
    chats = [chat for path in made_from if (chat := layout.Chat.read(path))]
    ledgers = [(files.read_json(one.manifest), one) for one in chats if Path(one.manifest).is_file()]
    known = [(ledger, Path(one.rejects), f"{_raw(one)}/") for ledger, one in ledgers if "reasons" in ledger]
    facts = [
        ({**manifest["facts"], "reasons": manifest["facts"]["rejected"]}, folder / NAME, "")
        for manifest, folder in zip(manifests, folders, strict=True)
        if isinstance(manifest["facts"].get("rejected"), dict)
    ]
    return [
        *([_row("raw lines to chat records", known)] if known else []),
        *([_row("chat records to training data", facts)] if facts else []),
    ]


def templated(path: Path, dataset: layout.Energon, read: int, reasons: Mapping[str, int]) -> Row:
    """The ledger of the samples of an energon dataset that a template could not write."""
    ledger = {"read": read, "reasons": reasons}
    return _row("samples to tokens", [(ledger, path, "")], of=f"{dataset}/")


def _raw(chat: layout.Chat) -> layout.Raw:
    return layout.Raw(dataset=chat.dataset)


def _row(stage: str, parts: Iterable[tuple[Mapping[str, Any], Path, str]], of: str = "") -> Row:
    """Sum ledgers up, and quote from the files of rejects beside them.

    Args:
        stage: in words.
        parts: ledgers, their files of rejects, and the folder that the files named there are in.
        of: only rejects of files below it are quoted.
    """
    row: Row = {"stage": stage, "read": 0, "rejected": 0, "blank": 0, "reasons": {}}
    for ledger, path, folder in parts:
        row["read"] += ledger["read"]
        row["blank"] += ledger.get("blank", 0)
        for reason, count in ledger["reasons"].items():
            entry = row["reasons"].setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += count
            row["rejected"] += count
        _quote(path, folder, of, {reason: row["reasons"][reason] for reason in ledger["reasons"]})
    return {**row, "kept": row["read"] - row["rejected"]}


def _quote(path: Path, folder: str, of: str, reasons: Mapping[str, dict[str, Any]]) -> None:
    """Add the first few lines of each reason; a file that is not there has none."""
    missing = {reason for reason, entry in reasons.items() if len(entry["examples"]) < EXAMPLES}
    if not missing or not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            entry = orjson.loads(line)
            if entry["reason"] not in missing or not entry["file"].startswith(of):
                continue
            examples = reasons[entry["reason"]]["examples"]
            examples.append({"where": folder + _where(entry), "message": entry["message"][:LONGEST]})
            if len(examples) == EXAMPLES:
                missing.discard(entry["reason"])
            if not missing:
                return


def _where(entry: Mapping[str, Any]) -> str:
    """File and line, or file and key."""
    return f"{entry['file']}:{entry['line']}" if entry.get("line") else f"{entry['file']}: {entry['id']}"
