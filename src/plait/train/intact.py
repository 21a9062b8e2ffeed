"""What a job makes sure of before it reads data: they are what was counted, made as now, and undamaged."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.data import ledger, prints, rejects
from plait.errors import DataError
from plait.tokens import repeats
from plait.tokens.made_by import KEYS, made_by
from plait.tokens.made_by import check as check_made_by

SAMPLED = 256 << 20
"""Bytes that are read of a mixture's data where a sample of them is compared."""
log = logging.getLogger(__name__)


def check_mixed(folder: Path, mixture: Mapping[str, Any]) -> None:
    """A mixture's sources are those that its analysis counted, and give the sequences that it has.

    Args:
        folder: the analysis.
        mixture: its mixture.yaml.

    Raises:
        DataError: one was made again since, has more or fewer, or was made by another tokenizer or template
            than stands there now.
    """
    for path, counted in files.read_manifest(folder)["inputs"].items():
        now = files.digest_of_input(path) if Path(path).exists() else "none: it is gone"
        if now != counted:
            raise DataError(
                f"mixture -> training: {folder} counted {path} of digest {counted[:12]}, it is "
                f"{now[:12]} now",
                hint=f"ask for {folder} again, or bring back the data that it counted",
            )
    sources = mixture.get("sources", ())
    _check_made_by(mixture, [source["prefix"] for source in sources])
    packs = {source["prefix"]: source["packs"] for source in sources if "packs" in source}
    for prefix, number in packs.items():
        facts, left = files.read_manifest(prefix)["facts"], rejects.counted(folder, prefix)
        made = facts["packs"] if "packs" in facts else facts["splits"]["train"]
        ledger.balance(f"mixture -> training, {prefix}", made, {"sequences": number, "rejected": left})
    if packs:
        total = mixture["total_instances"]
        ledger.balance(f"mixture -> training, total_instances of {folder}", total, packs)


def _check_made_by(mixture: Mapping[str, Any], sources: list[str]) -> None:
    """Tokens are those that tokenizer and template give now, and of one template in all of a mixture.

    Raises:
        DataError: it says which of them is another.
    """
    if "made_by" in mixture:
        now = made_by(Path(mixture["tokenizer"]), mixture["format"]["template"])
        check_made_by("the mixture", mixture["made_by"], now, mixture["tokenizer"])
        return
    shards = {source: files.read_manifest(source, kind="indexed") for source in sources}
    first = {key: (one, m["facts"][key]) for key in KEYS for one, m in shards.items() if key in m["facts"]}
    for shard, manifest in shards.items():
        folders = [path for path in manifest["inputs"] if layout.Tokenizer.read(path)]
        for folder in folders:
            now = made_by(Path(folder), manifest["settings"]["format"]["template"])
            check_made_by(shard, manifest["facts"], now, folder)
        for key, (other, digest) in first.items():
            check_made_by(shard, manifest["facts"], {**manifest["facts"], key: digest}, other)


def check_bytes(folder: Path, how: str, *, seed: str) -> None:
    """Compare what a mixture is made of with its manifests.

    Args:
        folder: the analysis; its own files are few, and always read.
        how: ``all`` files; ``sampled``: the sizes of all, and the bytes of some, at most SAMPLED in all; or
            ``none``.
        seed: decides which are sampled: the same of one job, others of the next.

    Raises:
        DataError: a file is missing, has another size or other bytes; it is named.
    """
    if how == "none":
        return
    files.check_manifest(folder)
    sources = [path for path in files.read_manifest(folder)["inputs"] if Path(path).is_dir()]
    listed = {
        Path(source, name): entry
        for source in sources
        for name, entry in files.read_manifest(source)["files"].items()
    }
    chosen = {*listed} if how == "all" else _sample(listed, seed)
    for path, entry in listed.items():
        files.check_file(path, entry, deep=path in chosen)
    log.info(
        "data of %s: %d files have their sizes, %d of them, of %.3f GB, their bytes (verify_data: %s)",
        folder, len(listed), len(chosen), sum(listed[path]["bytes"] for path in chosen) / 1e9, how,
    )  # fmt: skip


def _sample(listed: Mapping[Path, Mapping[str, Any]], seed: str) -> set[Path]:
    """Files in an order that the seed draws, as many as may be read."""
    left, chosen = SAMPLED, set()
    for path in sorted(listed, key=lambda one: hashlib.sha256(f"{seed} {one}".encode()).digest()):
        if listed[path]["bytes"] <= left:
            left -= listed[path]["bytes"]
            chosen.add(path)
    return chosen


def check_leaks(
    train: Sequence[tuple[Path, float]], evaluated: Sequence[tuple[Path, float]], folder: Path, listed: Path
) -> None:
    """No more packed samples train and are evaluated too than the evaluated mixture's ``leak_limit`` allows.

    Args:
        train: shards and weights.
        evaluated: those of the mixture that is evaluated.
        folder: its analysis.
        listed: a file that gets a line for each.

    Raises:
        DataError: more do; the first are named.
    """
    limit = files.read_manifest(folder)["settings"].get("mixture", {}).get("leak_limit", 1.0)
    ours, theirs = (_printed([one for one, _ in shards]) for shards in (train, evaluated))
    if theirs:
        repeats.check_leaks(ours, theirs, limit, listed)


def _printed(shards: Sequence[Path]) -> list[Path]:
    """Those shards whose samples can be compared; others are named."""
    found = [shard for shard in shards if prints.stand(shard)]
    if len(found) < len(shards):
        unknown = sorted({*map(str, shards)} - {*map(str, found)})
        log.warning(
            "%d of %d shards were packed by others: whether samples of them train and are evaluated too is "
            "not known: %s", len(unknown), len(shards), ", ".join(unknown[:3]),
        )  # fmt: skip
    return found
