"""Equal and similar samples of a mixture: of each dataset, of all, and of training and validation.

``duplicates.json`` beside the other files of an analysis counts them; ``leaks.jsonl`` lists each sample that
validates and trains too, with the one that trains.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from plait import files, layout
from plait.data import alike, prints
from plait.data.alike import Alike
from plait.data.prints import Printed
from plait.errors import DataError

DUPLICATES, LEAKS = "duplicates.json", "leaks.jsonl"
SHOWN, TOLD = 3, 10
"""Samples that a sentence names, and the page."""
NONE = -1
log = logging.getLogger(__name__)


def counts(sets: Sequence[Printed | NDArray[Any]]) -> dict[str, int]:
    """How many samples of one dataset repeat earlier ones.

    Returns:
        ``samples`` in all; those whose id, whole content or text came before; those that are not equal but
        similar, whole or by text; pictures that came before, and others that look like one.
    """
    several = Alike(sets)
    size = len(several)
    equal = {field: alike.later(several.equal(field), size) for field in ("id", "sample", "text")}
    texts, whole = equal["text"].copy(), equal["sample"].copy()
    for _, later, alike_pictures in several.similar_texts(lambda _, other: ~(texts[other] & whole[other])):
        texts[later] = True
        whole[later[alike_pictures]] = True
    pictures, looks = alike.picture_repeats(sets)
    return {
        "samples": size,
        "equal_ids": int(equal["id"].sum()),
        "equal_samples": int(equal["sample"].sum()),
        "similar_samples": int((whole & ~equal["sample"]).sum()),
        "equal_texts": int(equal["text"].sum()),
        "similar_texts": int((texts & ~equal["text"]).sum()),
        "equal_pictures": pictures,
        "similar_pictures": looks,
    }


def leaked(
    train: Sequence[Printed | NDArray[Any]], validation: Sequence[Printed | NDArray[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each sample that validates, an equal one that trains, and a similar one; NONE where none is."""
    both = Alike([*train, *validation])
    first = sum(map(len, train))
    found = tuple(np.full(len(both) - first, NONE, np.int64) for _ in range(2))

    def across(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (one < first) & (other >= first)

    for partners, pairs in zip(found, (both.equal("sample"), both.similar(across)), strict=True):
        for one, other in pairs:
            some = across(one, other)
            partners[other[some] - first] = one[some]
    return found[0], found[1]


def of_packs(folder: Path, shards: Sequence[layout.Indexed]) -> dict[str, Any]:
    """Count what repeats in the datasets of packed shards; of those that others packed nothing is known."""
    known = [shard for shard in shards if prints.stand(str(shard))]
    for shard in set(shards) - set(known):
        log.warning("%s was not packed by this plait: its repeated samples are not counted", shard)
    datasets: dict[str, list[Path]] = {}
    for shard in known:
        datasets.setdefault(shard.dataset, []).append(Path(str(shard)))
    return write(folder, datasets, [], 1.0)


def write(
    folder: Path,
    datasets: Mapping[str, Sequence[Path]],
    validation: Sequence[Path],
    limit: float,
) -> dict[str, Any]:
    """Count what repeats, and list what leaks.

    Args:
        folder: where the files go.
        datasets: folders with prints by dataset.
        validation: folders with prints of what validates.
        limit: share of the validating samples that may train too.

    Returns:
        What duplicates.json holds.

    Raises:
        DataError: more leak, or two samples of a dataset have one id; the first are named.
    """
    found = {name: counts([Printed(one) for one in several]) for name, several in datasets.items()}
    for name, repeats in found.items():
        _log(name, repeats)
        if repeats["equal_ids"]:
            _refuse_ids(name, datasets[name])
    train = [one for several in datasets.values() for one in several]
    leaks = check_leaks(train, validation, limit, folder / LEAKS) if validation else {}
    together = {"all": _together(train)} if len(found) > 1 else {}
    facts = {"datasets": found, **together, "leaks": leaks}
    files.write_json(folder / DUPLICATES, facts)
    return facts


def _together(folders: Sequence[Path]) -> dict[str, int]:
    """What repeats in all datasets as one; ids are of a dataset, so theirs say nothing."""
    found = counts([Printed(one) for one in folders])
    del found["equal_ids"]
    _log("all", found)
    return found


def _log(name: str, found: Mapping[str, int]) -> None:
    log.info("%s: %s", name, ", ".join(f"{number} {key.replace('_', ' ')}" for key, number in found.items()))


def told(folder: Path) -> dict[str, Any]:
    """What a reader is told of an analysis: what duplicates.json holds, and the ``first`` few leaks."""
    listed = folder / LEAKS
    with listed.open("rb") if listed.is_file() else nullcontext(()) as lines:
        first = [orjson.loads(line) for line in islice(lines, TOLD)]
    return {**files.read_json(folder / DUPLICATES), "first": first}


def _refuse_ids(dataset: str, folders: Sequence[Path]) -> None:
    """An index shard rejects ids that it had before, but sees no other shard's.

    Raises:
        DataError: always; it names ids.
    """
    pairs = Alike([Printed(one) for one in folders]).equal("id")
    rows = np.sort(np.concatenate([later for _, later in pairs]))
    some = ", ".join(id_ for _, id_ in _ids(folders, rows[:SHOWN]))
    raise DataError(
        f"{len(rows)} samples of {dataset} have ids that others have, in other shards: {some}",
        hint="give the records of its source ids of their own, or none: then file and line make them",
    )


def check_leaks(
    train: Sequence[Path], validation: Sequence[Path], limit: float, listed: Path | None = None
) -> dict[str, int]:
    """Count the samples that validate and train too, and list them in a file.

    Raises:
        DataError: they are more than ``limit`` allows.
    """
    equal, similar = leaked([Printed(one) for one in train], [Printed(one) for one in validation])
    partner = np.where(equal != NONE, equal, similar)
    rows = np.flatnonzero(partner != NONE)
    kinds = ["equal" if equal[number] != NONE else "similar" for number in rows]
    theirs = dict(_ids(train, np.unique(partner[rows])))
    lines = [
        {"id": id_, "like": kind, "train": theirs[int(partner[number])]}
        for (number, id_), kind in zip(_ids(validation, rows), kinds, strict=True)
    ]
    if listed is not None:
        listed.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    size = len(equal)
    found = {"validation": size, "equal": kinds.count("equal"), "similar": kinds.count("similar")}
    log.info("of %d samples that validate, %d train too and %d are like one that trains",
             size, found["equal"], found["similar"])  # fmt: skip
    if len(lines) > limit * size:
        some = "; ".join(f"{one['id']} is {one['like']} to {one['train']}" for one in lines[:SHOWN])
        raise DataError(
            f"{len(lines)} of {size} samples that validate train too, or are like one that does; at most "
            f"{limit:.2%} may: {some}",
            hint="take them out of one side, e.g. by `by_hash` of the dataset, or raise `leak_limit` of the "
            "mixture that validates",
        )
    return found


def _ids(folders: Sequence[Path], rows: Iterable[int]) -> list[tuple[int, str]]:
    """Some samples of several folders, in order, with their ids."""
    wanted, before, found = np.asarray(list(rows), np.int64), 0, []
    for folder in folders:
        size = len(Printed(folder))
        own = wanted[(wanted >= before) & (wanted < before + size)]
        names = prints.ids(folder, (own - before).tolist())
        found += list(zip(own.tolist(), names, strict=True))
        before += size
    return found
