"""From a step of a run back to the raw lines it was trained on.

The samples of a step stand in the run's log. Where it lacks them and the mixture is packed they are computed:
the order of packs is a function of seed and step. The documents of a pack stand beside its shard.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from plait import files, layout
from plait.data.lines import read_lines
from plait.data.webdataset import SAMPLES
from plait.errors import DataError
from plait.report import state, told
from plait.tokens.lineage import Lineage
from plait.train import lineage
from plait.train.job import Mixed


def trace(name: str, step: int) -> dict[str, Any]:
    """The sequences of a step, each with its documents.

    Args:
        name: the run.
        step: an iteration, from 1.

    Returns:
        ``run``, ``step``, ``skipped`` (whether a skip range leaves it out), ``trained`` (it is not yet, if it
        is not skipped either), ``logged`` (whether the run wrote the samples down; they are computed else),
        ``total`` and ``sequences``: of each ``sequence`` its number in the global batch, ``shard`` and
        ``pack`` or ``tar`` and ``key``, and ``documents``: ``id``, ``chat`` and ``line``, ``raw`` and
        ``raw_line``, and for packs ``start`` and ``end`` in tokens.

    Raises:
        DataError: there is no such run or step, or the data it was trained on are gone or others now.
    """
    (run,) = state.runs(name)
    _check_step(run, step)
    said = told.of(run)
    _check_own(run, said["settings"], step)
    told.check_unchanged(said["analysis"], said["digest"], "the run")
    found = lineage.of_step(Path(run.samples), step)
    left_out = found.skipped if found else told.is_left_out(said["settings"], step)
    trained = not left_out and (found is not None or step <= told.reached(run, said))
    samples = found.samples if found else _computed(run, said, step, _standing(left_out, trained))
    sequences = [{"sequence": number, **_sequence(one, said)} for number, one in samples.items()]
    _add_documents(sequences, said)
    return {
        "run": name,
        "step": step,
        "skipped": left_out,
        "trained": trained,
        "logged": found is not None,
        "total": found.total if found else len(samples),
        "sequences": sequences,
    }


def in_words(found: Mapping[str, Any]) -> Iterator[str]:
    """What was traced, for a reader."""
    listed, total = len(found["sequences"]), found["total"]
    how = "in the run's log" if found["logged"] else "computed from seed and step, not in the run's log"
    count = f"{total} sequences" if listed == total else f"{listed} of {total} sequences"
    standing = (
        "" if found["logged"] and found["trained"] else f"; {_standing(found['skipped'], found['trained'])}"
    )
    yield f"step {found['step']} of {found['run']}: {count}, {how}{standing}"
    for one in found["sequences"]:
        place = f"{one['shard']} pack {one['pack']}" if "shard" in one else f"{one['tar']} key {one['key']}"
        yield f"{one['sequence']}: {place}"
        yield from (f"   {_document(document)}" for document in one["documents"])
        if not one["documents"]:
            yield "   others made it: nothing says what it was made from"


def _standing(left_out: bool, trained: bool) -> str:
    if left_out:
        return "skip_train_iteration_range leaves the step out, which trains nothing"
    return "the step was trained" if trained else "the step is not trained yet"


def _document(one: Mapping[str, Any]) -> str:
    raw = f"{one['raw']} line {one['raw_line']}" if one["raw"] else "no raw line is known"
    part = f", tokens {one['start']} to {one['end'] - 1}" if "start" in one else ""
    name = f" ({one['id']})" if one["id"] else ""
    return f"{raw}, {one['chat']} line {one['line']}{name}{part}"


# The run


def _check_step(run: layout.Run, step: int) -> None:
    if not Path(run.schedule).is_file():
        raise DataError(f"{run.schedule} does not exist", hint="the run was not planned here")
    length = files.read_json(run.schedule)["train_iters"]
    if not 1 <= step <= length:
        raise DataError(f"{run} has no step {step}: it has 1 to {length}")


def _check_own(run: layout.Run, settings: Mapping[str, Any], step: int) -> None:
    """A run that goes on from another's checkpoint has not trained the steps before it."""
    before, first = settings["start_run"], settings["start_iteration"]
    if before and not settings["finetune"] and step <= first:
        raise DataError(
            f"{run} goes on from iteration {first} of {before}", hint=f"plait trace {before} --step {step}"
        )


def _computed(run: layout.Run, said: Mapping[str, Any], step: int, standing: str) -> dict[int, Any]:
    """The packs that seed and step give."""
    if "tokenizer" in Mixed(Path(said["analysis"])).content:
        last = lineage.last_step(Path(run.samples))
        raise DataError(
            f"the log of {run} has no step {step}, its last is {last}, and energon's order follows from the "
            f"steps before; {standing}",
            hint="train up to it, again where its log is gone",
        )
    total, order = said["settings"]["global_batch_size"], told.order(run, said)
    return {number: order[(step - 1) * total + number] for number in range(total)}


# From samples to lines


def _sequence(sample: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(sample, str):
        tar, _, key = sample.rpartition(told.TAR)
        return {"tar": f"{tar}.tar", "key": key}
    analysis, (source, pack) = said["analysis"], sample
    return {"shard": str(Mixed(Path(analysis)).shards[source][0]), "pack": pack}


def _add_documents(sequences: list[dict[str, Any]], said: Mapping[str, Any]) -> None:
    """Add to each sequence the documents that it is made of."""
    packs, others = ([one for one in sequences if key in one] for key in ("shard", "tar"))
    made_from = files.read_manifest(said["analysis"])["inputs"]
    datasets = {str(told.dataset(f"{one['tar']}/{one['key']}")) for one in others}
    for folder in sorted({one["shard"] for one in packs} | datasets):
        told.check_unchanged(folder, made_from.get(folder), said["analysis"])
    origins = {shard: _lineage(shard) for shard in {one["shard"] for one in packs}}
    for one in packs:
        found = origins[one["shard"]]
        one["documents"] = [asdict(origin) for origin in found[one["pack"]]] if found else []
    listed = _listed({f"{one['tar']}/{one['key']}" for one in others})
    for one in others:
        found_row = listed.get(f"{one['tar']}/{one['key']}")
        one["documents"] = [found_row] if found_row else []
    _add_ids([document for one in packs for document in one["documents"]])


def _lineage(shard: str) -> Lineage | None:
    """What a shard says of its documents; None where another program packed it, which says nothing."""
    return Lineage(shard) if Lineage.stands(shard) else None


def _add_ids(documents: list[dict[str, Any]]) -> None:
    """Add the ids that the chat records have; none where the records are gone."""
    wanted: dict[str, set[int]] = {}
    for one in documents:
        wanted.setdefault(one["chat"], set()).add(one["line"])
    ids = {path: _ids(Path(path), lines) for path, lines in wanted.items()}
    for one in documents:
        one["id"] = ids[one["chat"]].get(one["line"], "")


def _ids(chats: Path, lines: Collection[int]) -> dict[int, str]:
    if not chats.is_file():
        return {}
    upto = islice(read_lines(chats), max(lines))
    return {number: str(orjson.loads(line).get("id", "")) for number, line in upto if number in lines}


def _listed(places: Collection[str]) -> dict[str, dict[str, Any]]:
    """What the datasets' ``samples.jsonl`` say of samples of energon, by tar and key as one path.

    A dataset that someone else prepared has none: its tars are the raw source.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in {told.dataset(place) for place in places}:
        if (folder / SAMPLES).is_file():
            for _, line in read_lines(folder / SAMPLES):
                row = orjson.loads(line)
                place = f"{folder}/{row.pop('tar')}/{row.pop('key')}"
                if place in places:
                    found[place] = row
    return found
