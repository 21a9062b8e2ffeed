"""The analysis stage: token counts of a mixture's shards, as figures, and its sampling weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from plait import files, layout
from plait.data import ledger
from plait.errors import DataError
from plait.tokens import mixture
from plait.tokens.indexed import ROLE, TEXT, IndexedReader, read_rows
from plait.tokens.roles import PACK_SEP

PAGE = "tokens.html"
log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
MEASURES: dict[str, str] = {
    "document_tokens": "tokens of a document",
    "n_tokens": "tokens of a sequence",
    "n_text_tokens": "text tokens of a sequence",
    "n_image_tokens": "image tokens of a sequence",
    "n_loss_tokens": "loss tokens of a sequence",
    "n_images": "pictures of a sequence",
}
"""What is counted, in words. A sequence is a pack of documents, or one document, clipped (energon)."""
TOTALS: dict[str, str] = {
    "tokens": "n_tokens",
    "text_tokens": "n_text_tokens",
    "image_tokens": "n_image_tokens",
    "loss_tokens": "n_loss_tokens",
    "images": "n_images",
}
"""The totals that sum a measure."""
HOW_MANY = ("packs", "documents", "samples", "rejected", "clipped", "unanswered")
"""The other totals: packed shards have the first two, energon's datasets the rest."""


@dataclass(frozen=True)
class Counted:
    """One indexed shard, or one energon dataset, measured."""

    source: layout.Indexed | layout.Energon
    measures: Mapping[str, Ints]
    counts: Mapping[str, int]
    """How many packs and documents (one that was split is one); or samples, rejected ones beside them,
    clipped ones, and ones of which no trained token is left."""
    fill: float


def build(
    folder: Path,
    name: str,
    counted: Sequence[Counted],
    settings: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an analysis into an empty folder.

    Args:
        folder: where the files go.
        name: the mixture's.
        counted: its shards, measured.
        settings: a mixture of the config: ``datasets`` or ``weights``.
        more: what else mixture.yaml says; without it, the mixture is Megatron's to read, in mixture.txt.

    Returns:
        The facts of its manifest.

    Raises:
        DataError: a shard is not whole, or is not of the mixture.
    """
    from plait.tokens.page import page

    weighed = weigh(counted, settings)
    tokens = to_json(counted)
    mixed = {**(more or {}), **mixture.to_json(weighed)}
    line = mixture.classic(weighed, data="" if more else "/data")
    files.write_json(folder / "tokens.json", tokens)
    (folder / "mixture.yaml").write_text(
        yaml.safe_dump(mixed, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    if not more:
        (folder / "mixture.txt").write_text(line + "\n", encoding="utf-8")
    measures = {dataset: together(several) for dataset, several in by_dataset(counted).items()}
    (folder / PAGE).write_text(page(name, tokens, mixed, line, measures), encoding="utf-8")
    _report(tokens, mixed, line)
    return {"total_instances": mixed["total_instances"], **tokens["total"]}


def measure(shard: layout.Indexed) -> Counted:
    """Read what there is to count of a shard, without its tokens.

    Raises:
        DataError: the shard is not whole.
    """
    folder = Path(str(shard))
    facts = files.read_manifest(folder, kind="indexed")["facts"]
    rows = read_rows(folder / "data.jsonl")
    keys = ("n_tokens", "n_image_tokens", "n_loss_tokens", "n_images")
    found = {key: np.array([row[key] for row in rows], np.int64) for key in keys}
    found["n_text_tokens"] = found["n_tokens"] - found["n_image_tokens"]
    found["document_tokens"] = document_lengths(
        IndexedReader(folder / ROLE), own_separators=facts["own_separators"]
    )
    _check_rows(folder, facts, rows)
    counts = {"packs": len(rows), "documents": facts["documents"]}
    return Counted(shard, found, counts, facts["fill"])


ROWS = {"packs": None, "tokens": "n_tokens", "image_tokens": "n_image_tokens", "images": "n_images"}
"""Counts of a shard's manifest, and the key of data.jsonl that sums up to each; None: its rows."""


def _check_rows(folder: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, int]]) -> None:
    """The manifest of a shard, its rows and its tokens say the same.

    Raises:
        DataError: two of them do not.
    """
    for key, column in ROWS.items():
        counted = sum(row[column] for row in rows) if column else len(rows)
        ledger.balance(f"index -> mixture, {key} of {folder}", facts[key], {"in_data.jsonl": counted})
    sizes = IndexedReader(folder / TEXT).sizes
    if sizes.tolist() != [row["n_tokens"] for row in rows]:
        raise DataError(
            f"index -> mixture: the packs of {folder / TEXT} are not of the sizes that data.jsonl has",
            hint=f"remove {folder} and ask for it again",
        )


def document_lengths(roles: IndexedReader, *, own_separators: bool) -> Ints:
    """Tokens of each document, or part of a split one: what stands between separators or pack bounds.

    Args:
        roles: the roles of a shard.
        own_separators: whether the documents begin with a separator of their own, which counts then.
    """
    flat = roles.flat
    breaks = np.flatnonzero(flat == PACK_SEP)
    skip = np.full(len(breaks), not own_separators, np.int64)
    # a pack ends behind its last token, where no separator is
    ends = np.concatenate([breaks, np.cumsum(roles.sizes, dtype=np.int64)])
    skips = np.concatenate([skip, np.zeros(len(roles), np.int64)])
    order = np.argsort(ends, kind="stable")
    starts = np.concatenate([[0], (ends + skips)[order][:-1]])
    return np.asarray(ends[order] - starts, np.int64)


def weigh(counted: Sequence[Counted], settings: Mapping[str, Any]) -> mixture.Weighed:
    """The shards with their sampling weights.

    Raises:
        DataError: the shards are not those of the mixture.
    """
    sizes = [(c.source, c.measures["n_tokens"]) for c in counted]
    shards = [mixture.Shard(str(i), i.dataset, len(size), int(size.sum())) for i, size in sizes]
    if settings["weights"]:
        return mixture.explicit(shards, settings["weights"])
    mixture.check(shards, settings["datasets"])
    return mixture.natural(shards)


def by_dataset(counted: Sequence[Counted]) -> dict[str, list[Counted]]:
    """Shards by dataset, in the order of the mixture."""
    found: dict[str, list[Counted]] = {}
    for shard in counted:
        found.setdefault(shard.source.dataset, []).append(shard)
    return found


def together(shards: Sequence[Counted]) -> dict[str, Ints]:
    """The measures of several shards as one."""
    return {key: np.concatenate([shard.measures[key] for shard in shards]) for key in MEASURES}


# Figures


def totals(shards: Sequence[Counted]) -> dict[str, int]:
    """Packs and documents, or samples; tokens and pictures in all."""
    return {
        **{name: sum(shard.counts[name] for shard in shards) for name in shards[0].counts},
        **{name: sum(int(shard.measures[key].sum()) for shard in shards) for name, key in TOTALS.items()},
    }


def statistics(values: Ints) -> dict[str, float]:
    """What pandas' describe gives: standard deviation of a sample, quartiles by interpolation."""
    low, quarter, half, three, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    figures = {
        "count": len(values), "mean": values.mean(), "std": deviation,
        "min": low, "25%": quarter, "50%": half, "75%": three, "max": high,
    }  # fmt: skip
    return {name: round(float(figure), 6) for name, figure in figures.items()}


def to_json(counted: Sequence[Counted]) -> dict[str, Any]:
    """The content of tokens.json."""
    datasets = {}
    for name, shards in by_dataset(counted).items():
        measures = together(shards)
        datasets[name] = {
            **totals(shards),
            "statistics": {key: statistics(measures[key]) for key in MEASURES},
            "shards": {str(shard.source): totals([shard]) | {"fill": shard.fill} for shard in shards},
        }
    return {"schema": files.SCHEMA, "datasets": datasets, "total": totals(counted)}


def _report(tokens: Mapping[str, Any], mixed: Mapping[str, Any], line: str) -> None:
    """The lines of SOLO's notebook, from which its users copied by hand."""
    total = tokens["total"]
    share = total["image_tokens"] / total["tokens"]
    log.info("# of files: %d", len(mixed["sources"]))
    log.info("Total text tokens: %d (%.2f %%)", total["text_tokens"], 100 * (1 - share))
    log.info("Total image tokens: %d (%.2f %%)", total["image_tokens"], 100 * share)
    log.info("Total tokens: %d", total["tokens"])
    log.info("Total instances: ** %d **", mixed["total_instances"])
    log.info("===== FINAL MIXTURE =====\n%s\n=========================", line)
