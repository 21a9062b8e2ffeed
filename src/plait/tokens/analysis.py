"""The analysis stage: token counts of a mixture's shards, as figures, and its sampling weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from plait import files, layout
from plait.data import ledger
from plait.errors import DataError
from plait.tokens import indexed, mixture, solver
from plait.tokens.indexed import ROLE, TEXT, IndexedReader
from plait.tokens.lineage import Lineage
from plait.tokens.roles import PACK_SEP
from plait.tokens.tally import Tally

if TYPE_CHECKING:
    from plait.tokens.page import Look

PAGE = "tokens.html"
SHOWN = "page.json"
"""What the page has besides tokens.json: which samples are shown, and what was rejected."""
log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Counts = NDArray[np.int32]
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
HISTOGRAMS = {"document_tokens": "documents", "n_tokens": "sequences"}
"""The measures of which tokens.json has histograms, and what they are of."""
QUANTILES = 200
"""Equal shares that a distribution is described by: more would not be seen."""
BINS = 32
"""Bins of a histogram, about."""
FILLS = 20
"""Bins of the histogram of fill, exactly."""
TAIL = 30
"""A histogram's bins grow with the values where the largest is so many times the median."""
HOW_MANY = ("packs", "documents", "samples", "rejected", "clipped", "unanswered")
"""The other totals: packed shards have the first two, energon's datasets the rest."""


@dataclass(frozen=True)
class Counted:
    """One indexed shard, or one energon dataset, measured."""

    source: layout.Indexed | layout.Energon
    measures: Mapping[str, Tally]
    counts: Mapping[str, int]
    """How many packs and documents (one that was split is one); or samples, rejected ones beside them,
    clipped ones, and ones of which no trained token is left."""
    fill: float
    limit: int
    """Tokens that a sequence has room for."""


def build(
    folder: Path,
    name: str,
    counted: Sequence[Counted],
    settings: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    look: "Look | None" = None,
) -> dict[str, Any]:
    """Write an analysis into an empty folder.

    Args:
        folder: where the files go.
        name: the mixture's.
        counted: its shards, measured.
        settings: a mixture of the config: ``datasets``, ``weights`` or ``solve``.
        more: what else mixture.yaml says; without it, the mixture is Megatron's to read, in mixture.txt.
        look: what the page shows besides figures; None: it is looked for in the packed shards.

    Returns:
        The facts of its manifest.

    Raises:
        DataError: a shard is not whole, or is not of the mixture; or no mixture keeps to its limits.
    """
    from plait.tokens.page import look_at, page

    weighed, instances, solved = weigh(counted, settings, f"mixtures.{name}.solve")
    tokens = to_json(counted) | solved
    mixed = {**(more or {}), **mixture.to_json(weighed, instances), **solved}
    line = mixture.classic(weighed, data="" if more else "/data")
    files.write_json(folder / "tokens.json", tokens)
    (folder / "mixture.yaml").write_text(
        yaml.safe_dump(mixed, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    if not more:
        (folder / "mixture.txt").write_text(line + "\n", encoding="utf-8")
    look = look or look_at(counted)
    files.write_json(folder / SHOWN, look.to_json())
    (folder / PAGE).write_text(page(name, tokens, mixed, line, look), encoding="utf-8")
    _report(tokens, mixed, line)
    binding = {"binding": binding_of(solved["solved"])} if solved else {}
    return {"total_instances": mixed["total_instances"], **tokens["total"], **binding}


def measure(shard: layout.Indexed) -> Counted:
    """Read what there is to count of a shard, without its tokens.

    Raises:
        DataError: the shard is not whole.
    """
    folder = Path(str(shard))
    facts = files.read_manifest(folder, kind="indexed")["facts"]
    found = indexed.read_columns(folder)
    counted = _check_rows(folder, facts, found)
    found["n_text_tokens"] = found["n_tokens"] - found["n_image_tokens"]
    starts, ends = document_bounds(folder, own_separators=facts["own_separators"])
    found["document_tokens"] = (ends - starts).astype(np.int32)
    counts = {"packs": counted["packs"], "documents": facts["documents"]}
    measures = {key: Tally.of(numbers) for key, numbers in found.items()}
    return Counted(shard, measures, counts, facts["fill"], shard.seq)


def _check_rows(folder: Path, facts: Mapping[str, Any], columns: Mapping[str, Counts]) -> dict[str, int]:
    """The manifest of a shard, its rows and its tokens say the same; what the rows sum up to.

    Raises:
        DataError: two of them do not.
    """
    counted = indexed.totals(columns)
    for key in ("packs", "tokens", "image_tokens", "images"):
        ledger.balance(f"index -> mixture, {key} of {folder}", facts[key], {"in_data.jsonl": counted[key]})
    if not np.array_equal(IndexedReader(folder / TEXT).sizes, columns["n_tokens"]):
        raise DataError(
            f"index -> mixture: the packs of {folder / TEXT} are not of the sizes that data.jsonl has",
            hint=f"remove {folder} and ask for it again",
        )
    return counted


def document_bounds(folder: Path, *, own_separators: bool) -> tuple[Ints, Ints]:
    """First token of each document, or part of a split one, and the one after its last, in a whole shard.

    A document is what stands between separators or pack bounds. A separator of its own counts, one that was
    put before it does not: of some documents and parts one has it, of others the other, as lineage tells.

    Args:
        folder: a shard.
        own_separators: whether documents begin with a separator of their own, where there is no lineage.

    Raises:
        DataError: its lineage has not the documents that its roles have.
    """
    roles = IndexedReader(folder / ROLE)
    # a pack ends behind its last token, where no separator is
    ends = np.concatenate([places(roles, PACK_SEP), np.cumsum(roles.sizes, dtype=np.int64)])
    if Lineage.stands(folder):
        lengths = Lineage(folder).lengths
        came = f"index -> mixture, documents of {folder}"
        ledger.balance(came, len(ends), {"in_data-lineage": len(lengths)})
        ends.sort()
        return np.asarray(ends - lengths, np.int64), ends
    order = np.argsort(ends, kind="stable")
    put = (order < len(ends) - len(roles)) & (not own_separators)
    ends = np.asarray(ends[order], np.int64)
    return np.concatenate([np.zeros(1, np.int64), ends[:-1] + put[:-1]]), ends


def places(items: IndexedReader, wanted: int) -> Ints:
    """Where a value stands among all elements."""
    found, before = [np.empty(0, np.int64)], 0
    for stretch in items.stretches():
        found.append(np.flatnonzero(stretch == wanted) + before)
        before += len(stretch)
    return np.concatenate(found)


def weigh(
    counted: Sequence[Counted], settings: Mapping[str, Any], where: str = "solve"
) -> tuple[mixture.Weighed, int, dict[str, Any]]:
    """The shards with their sampling weights, the sequences of an epoch, and how they were solved, if so.

    Raises:
        DataError: the shards are not those of the mixture, or no mixture keeps to its limits.
    """
    shards = [_shard(one) for one in counted]
    if settings.get("solve"):
        mixture.check(shards, list(settings["solve"]["datasets"]))
        found = solver.solve(shards, settings["solve"], where)
        return *mixture.read(shards, found.reads), {"solved": found.to_json()}
    if settings["weights"]:
        weighed = mixture.explicit(shards, settings["weights"])
    else:
        mixture.check(shards, settings["datasets"])
        weighed = mixture.natural(shards)
    return weighed, mixture.instances(weighed), {}


def _shard(one: Counted) -> mixture.Shard:
    sizes, pictures = (one.measures[key] for key in ("n_tokens", "n_image_tokens"))
    return mixture.Shard(str(one.source), one.source.dataset, len(sizes), sizes.total, pictures.total)


def binding_of(solved: Mapping[str, Any]) -> list[str]:
    """The limits that a solved mixture meets exactly, in words."""
    return [f"{one['key']} at {one['side']} {one['bound']:.12g}" for one in solved["limits"] if one["binds"]]


def by_dataset(counted: Sequence[Counted]) -> dict[str, list[Counted]]:
    """Shards by dataset, in the order of the mixture."""
    found: dict[str, list[Counted]] = {}
    for shard in counted:
        found.setdefault(shard.source.dataset, []).append(shard)
    return found


def together(shards: Sequence[Counted], key: str) -> Tally:
    """A measure of several shards as one."""
    return Tally.together(shard.measures[key] for shard in shards)


# Figures


def totals(shards: Sequence[Counted]) -> dict[str, int]:
    """Packs and documents, or samples; tokens and pictures in all."""
    return {
        **{name: sum(shard.counts[name] for shard in shards) for name in shards[0].counts},
        **{name: sum(shard.measures[key].total for shard in shards) for name, key in TOTALS.items()},
    }


def statistics(tally: Tally) -> dict[str, float]:
    """What pandas' describe gives: standard deviation of a sample, quartiles by interpolation."""
    low, quarter, half, three, high = tally.quantile([0, 0.25, 0.5, 0.75, 1])
    figures = {
        "count": len(tally), "mean": tally.mean, "std": tally.deviation,
        "min": low, "25%": quarter, "50%": half, "75%": three, "max": high,
    }  # fmt: skip
    return {name: round(float(figure), 6) for name, figure in figures.items()}


def quantiles(tally: Tally) -> list[int]:
    """The least, and the values that 1/200, 2/200, ... all of them do not exceed."""
    places = -(-np.arange(QUANTILES + 1) * len(tally) // QUANTILES) - 1
    found: list[int] = tally.at(np.maximum(places, 0)).tolist()
    return found


def histogram(tally: Tally) -> dict[str, list[int]]:
    """How many values fall between bounds: an upper bound belongs to the next bin.

    Args:
        tally: of values from 1 on.
    """
    low, high = int(tally.values[0]), int(tally.values[-1])
    if high > TAIL * tally.quantile([0.5])[0]:
        edges = np.unique(np.rint(np.geomspace(low, high + 1, BINS + 1)).astype(np.int64))
    else:
        width = -(-(high + 1) // BINS)
        edges = np.arange(0, high + width + 1, width)
    counts, _ = np.histogram(tally.values, edges, weights=tally.counts)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def filled(sizes: Tally, limit: int) -> dict[str, Any]:
    """How full sequences are: the mean, and how many are 0 to 5 %, 5 to 10 %, ... full."""
    counts = np.zeros(FILLS, np.int64)
    np.add.at(counts, np.minimum(sizes.values * FILLS // limit, FILLS - 1), sizes.counts)
    return {
        "limit": limit,
        "mean": round(sizes.mean / limit, 6),
        "edges": [number / FILLS for number in range(FILLS + 1)],
        "counts": counts.tolist(),
    }


def to_json(counted: Sequence[Counted]) -> dict[str, Any]:
    """The content of tokens.json."""
    datasets = {}
    for name, shards in by_dataset(counted).items():
        datasets[name] = {
            **totals(shards),
            "statistics": {key: statistics(together(shards, key)) for key in MEASURES},
            "quantiles": {key: quantiles(together(shards, key)) for key in MEASURES},
            "histograms": {key: histogram(together(shards, key)) for key in HISTOGRAMS},
            "fill": filled(together(shards, "n_tokens"), shards[0].limit),
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
    if solved := mixed.get("solved"):
        log.info("Solved: %d tokens an epoch; binding: %s", solved["tokens"], ", ".join(binding_of(solved)))
        if solved["left_out"]:
            log.info("Left out, for no limit wants them: %s", ", ".join(solved["left_out"]))
    log.info("===== FINAL MIXTURE =====\n%s\n=========================", line)
