"""Counting the tokens of energon datasets: every training sample, as training will see it."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from plait import files, layout
from plait.data import energon, ledger
from plait.data.prints import Prints
from plait.data.rejects import NAME, Record, Rejects, to_json
from plait.errors import DataError, RecordError
from plait.tokens import analysis, rejected, repeats, shown
from plait.tokens.llava import Encoded, LlavaRenderer
from plait.tokens.made_by import made_by
from plait.tokens.page import Look

BLEND = "metadataset.yaml"


def build(
    folder: Path,
    target: layout.Analysis,
    tokenizer: Path,
    datasets: Sequence[layout.Energon],
    settings: Mapping[str, Any],
    workers: int = 1,
) -> dict[str, Any]:
    """Write the analysis of an energon mixture into an empty folder.

    Args:
        folder: where the files go.
        target: the analysis.
        tokenizer: the format's tokenizer.
        datasets: those of the mixture; those of its validation may be among them.
        settings: ``mixture`` and ``format`` of the config, and ``image_token_id`` of the models that read it.
        workers: processes; all but one look for what repeats.

    Returns:
        The facts of its manifest.

    Raises:
        DataError: the datasets are not those of the mixture, one is not whole, or the template cannot write
            more samples of it than the format's ``reject_limit`` allows.
    """
    mixed, form = settings["mixture"], settings["format"]
    names = mixed["datasets"] or list((mixed.get("solve") or {}).get("datasets") or mixed["weights"])
    _check(datasets, {*names, *mixed["validation"]})
    length = mixed["decoder_seq_length"]
    renderer = LlavaRenderer(tokenizer, form, settings["image_token_id"])
    others = _others(workers - 1)
    with (folder / NAME).open("wb") as out, TemporaryDirectory() as beside, others as helping:
        rejects = {one: Rejects(out) for one in datasets if one.dataset in names}
        draws = {one: shown.Draw.of(one.dataset, _expected(one)) for one in rejects}
        printed = {one: Path(beside, one.dataset) for one in rejects}
        counted = [
            measure(one, renderer, length, bad, printed[one], draws[one], helping)
            for one, bad in rejects.items()
        ]
        validation = _validating(mixed["validation"] or names, names, Path(beside, "validation"), helping)
        repeated = repeats.write(
            folder,
            {one.dataset: [place] for one, place in printed.items()},
            [validation],
            mixed["leak_limit"],
        )
    more = {
        "tokenizer": str(tokenizer),
        "image_token_id": renderer.image_id,
        "decoder_seq_length": length,
        "format": dict(form),
        "made_by": made_by(tokenizer, form["template"]),
    }
    look = Look(
        {one.dataset: shown.with_sources(Path(str(one)), draw.shown) for one, draw in draws.items()},
        {one.dataset: _stages(folder, one, bad) for one, bad in rejects.items()},
        shown.Words(tokenizer),
        repeats.told(folder),
    )
    facts = analysis.build(folder, target.mixture, counted, mixed, more, look)
    sources = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))["sources"]
    weights = {one["prefix"]: one["weight"] for one in sources}
    validating = [str(layout.Energon(dataset=name)) for name in mixed["validation"]]
    blend = energon.blend(weights, validating, relative_to=Path(str(target)))
    (folder / BLEND).write_text(yaml.safe_dump(blend, sort_keys=False), encoding="utf-8")
    facts["duplicates"] = repeated
    return {**facts, "reasons": to_json(sum((one.reasons for one in rejects.values()), Counter()))}


def _others(count: int) -> AbstractContextManager[Executor | None]:
    """So many processes beside this one."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork")) if count else nullcontext()


def _check(datasets: Sequence[layout.Energon], names: set[str]) -> None:
    """Compare the datasets that are there with those that train or validate."""
    found = {one.dataset for one in datasets}
    if found != names:
        raise DataError(
            f"the datasets are {', '.join(sorted(found))}; the mixture names {', '.join(sorted(names))}"
        )


def _expected(dataset: layout.Energon) -> int:
    """The training samples that a dataset's manifest counts."""
    return int(files.read_manifest(str(dataset), kind="energon")["facts"]["splits"]["train"])


def _stages(folder: Path, dataset: layout.Energon, rejects: Rejects) -> list[rejected.Row]:
    """The ledgers of the stages that made a dataset, and of this one."""
    own = rejected.templated(folder / NAME, dataset, _expected(dataset), rejects.reasons)
    return [*rejected.stages([Path(str(dataset))]), own]


def measure(
    dataset: layout.Energon,
    renderer: LlavaRenderer,
    length: int,
    rejects: Rejects,
    beside: Path,
    draw: shown.Draw,
    others: Executor | None = None,
) -> analysis.Counted:
    """Tokenise every training sample of a dataset: keep its counts, and the few that are drawn.

    Args:
        dataset: what to read.
        renderer: writes its samples.
        length: tokens that a sample has room for.
        rejects: gets those that the format does not take.
        beside: a folder, made here, that gets the prints of the others.
        draw: which of them are shown.
        others: processes that make the prints.

    Raises:
        DataError: it is not whole, or the template cannot write more of its samples than may be rejected.
    """
    folder = Path(str(dataset))
    expected, kept = _expected(dataset), []
    beside.mkdir()
    with Prints(beside, others) as prints:
        for number, (tar, key, sample) in enumerate(_encoded(folder, renderer, rejects, length, prints)):
            clipped = sample.clip(length)
            kept.append(_counts(clipped))
            draw.offer(number, partial(shown.of_sample, folder, tar, key, clipped, renderer.tokens))
    whole = np.array(kept, np.int64)
    ledger.balance(
        f"energon -> mixture, training samples of {folder}",
        expected,
        {"counted": len(whole), "rejected": rejects.count},
    )
    rejects.check(
        expected,
        renderer.form["reject_limit"],
        str(folder),
        "mend the records, or name another template or instruction, or raise reject_limit of the format in "
        "config/",
    )
    if not len(whole):
        raise DataError(
            f"no sample of {folder} is left to train on", hint="a lower reject_limit of the format says why"
        )
    tokens, pictures, trained, images, original = whole.T
    found = {
        "document_tokens": original,
        "n_tokens": tokens,
        "n_image_tokens": pictures,
        "n_text_tokens": tokens - pictures,
        "n_loss_tokens": trained,
        "n_images": images,
    }
    counts = {
        "samples": len(whole),
        "rejected": rejects.count,
        "clipped": int((original > tokens).sum()),
        "unanswered": int((trained == 0).sum()),
    }
    return analysis.Counted(dataset, found, counts, float(tokens.mean() / length), length)


def _encoded(
    folder: Path, renderer: LlavaRenderer, rejects: Rejects, length: int, prints: Prints
) -> Iterator[tuple[str, str, Encoded]]:
    """The samples that the format takes, each with its tar and its key."""
    for name, sample in energon.located(folder):
        try:
            found = _checked(renderer.encode(renderer.instructed(sample, sample.id)), renderer, length)
        except RecordError as error:
            rejects.add(Record(folder / name, None, sample.id), error.reason, str(error))
            continue
        prints.append(sample, sample.id)
        yield name, sample.id, found


def _validating(
    names: Sequence[str], trained: Sequence[str], beside: Path, others: Executor | None = None
) -> Path:
    """A folder with the prints of what validates: val splits, or all of what has none and does not train."""
    beside.mkdir()
    with Prints(beside, others) as prints:
        for name in names:
            folder = Path(str(layout.Energon(dataset=name)))
            whole = name not in trained and not energon.splits(folder)["val"]
            for sample in energon.read(folder, "train" if whole else "val"):
                prints.append(sample, sample.id)
    return beside


def _checked(sample: Encoded, renderer: LlavaRenderer, length: int) -> Encoded:
    """The sample, if the format takes it.

    Raises:
        RecordError: nothing of it would be trained.
    """
    if renderer.form["no_loss"] == "reject" and not sample.teaches(length):
        raise RecordError(f"no answer is within the first {length} tokens", reason="no_loss")
    return sample


def _counts(kept: Encoded) -> tuple[int, int, int, int, int]:
    """Tokens, those of pictures, trained ones, pictures, and tokens before clipping."""
    pictures = int((kept.picture_rows >= 0).sum())
    trained = int(kept.trained[1:].sum())
    return len(kept.input_ids), pictures, trained, len(kept.pictures), len(kept.input_ids) + kept.clipped
