"""Counting the tokens of energon datasets: every training sample, as training will see it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from plait import files, layout
from plait.data import energon, ledger, prints
from plait.data.batches import batches
from plait.data.chat import BYTES, SAMPLES, Sample
from plait.data.helpers import Helpers
from plait.data.rejects import NAME, Record, Rejects, to_json
from plait.errors import DataError, RecordError
from plait.tokens import analysis, rejected, repeats, shown
from plait.tokens.llava import Encoded, LlavaRenderer
from plait.tokens.made_by import made_by
from plait.tokens.page import Look
from plait.tokens.tally import Tally

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
        workers: processes that tokenise and look for what repeats, this one among them.

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
    looker = Looker(renderer, length)
    with (folder / NAME).open("wb") as out, TemporaryDirectory() as beside:
        rejects = {one: Rejects(out) for one in datasets if one.dataset in names}
        draws = {one: shown.Draw.of(one.dataset, _expected(one)) for one in rejects}
        printed = {one: Path(beside, "trained", one.dataset) for one in rejects}
        with Helpers(workers - 1, looker.look) as looking:
            counted = [
                measure(one, looker, bad, printed[one], draws[one], looking) for one, bad in rejects.items()
            ]
        with Helpers(workers - 1, _printed) as looking:
            validation = _validating(mixed["validation"] or names, names, Path(beside, "validation"), looking)
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


Batch = tuple[energon.Prepared, list[energon.Place]]
"""Samples of a dataset, which are read where they are looked at."""
Printed = tuple[NDArray[Any], list[str]]
"""What samples are compared by, and their ids."""


class Counts(NamedTuple):
    """Tokens of a sample, those of pictures, trained ones, pictures, and tokens before clipping."""

    tokens: int
    pictures: int
    trained: int
    images: int
    original: int


@dataclass(frozen=True)
class Looked:
    """What became of a batch.

    Attributes:
        found: the counts of each sample, or why the format does not take it.
        ids: the id of each.
        rows: what those that it takes are compared by.
    """

    found: list[Counts | RecordError]
    ids: list[str]
    rows: NDArray[Any]


@dataclass(frozen=True)
class Looker:
    """Tokenises samples as training does, with room for ``length`` tokens."""

    renderer: LlavaRenderer
    length: int

    def look(self, batch: Batch) -> Looked:
        """Read samples, count their tokens, and look what they are compared by."""
        dataset, places = batch
        samples = [dataset.sample(place) for place in places]
        found = [self._counted(sample) for sample in samples]
        taken = [one for one, counts in zip(samples, found, strict=True) if isinstance(counts, Counts)]
        rows = prints.rows([(one, one.id) for one in taken])
        return Looked(found, [one.id for one in samples], rows)

    def encoded(self, sample: Sample) -> Encoded:
        """A sample that the format takes, clipped.

        Raises:
            RecordError: nothing of it would be trained, or the template cannot write it.
        """
        found = self.renderer.encode(self.renderer.instructed(sample, sample.id))
        if self.renderer.form["no_loss"] == "reject" and not found.teaches(self.length):
            raise RecordError(f"no answer is within the first {self.length} tokens", reason="no_loss")
        return found.clip(self.length)

    def _counted(self, sample: Sample) -> Counts | RecordError:
        """The counts of a sample, or why the format does not take it."""
        try:
            kept = self.encoded(sample)
        except RecordError as error:
            return error
        pictures, trained = int((kept.picture_rows >= 0).sum()), int(kept.trained[1:].sum())
        size = len(kept.input_ids)
        return Counts(size, pictures, trained, len(kept.pictures), size + kept.clipped)

    def shown(self, dataset: energon.Prepared, place: energon.Place) -> shown.Shown:
        """A sample as it is shown."""
        sample = dataset.sample(place)
        encoded = self.encoded(sample)
        return shown.of_sample(dataset.folder, place.tar, sample.id, encoded, self.renderer.tokens)


def measure(
    dataset: layout.Energon,
    looker: Looker,
    rejects: Rejects,
    beside: Path,
    draw: shown.Draw,
    looking: Helpers[Batch, Looked],
) -> analysis.Counted:
    """Tokenise every training sample of a dataset: keep its counts, and the few that are drawn.

    Args:
        dataset: what to read.
        looker: tokenises its samples.
        rejects: gets those that the format does not take.
        beside: a folder, made here, that gets the prints of the others.
        draw: which of them are shown.
        looking: processes that do what the looker does.

    Raises:
        DataError: it is not whole, or the template cannot write more of its samples than may be rejected.
    """
    folder, expected = Path(str(dataset)), _expected(dataset)
    found = Found(looker.length)
    beside.mkdir(parents=True)
    with prints.Prints(beside) as out:
        for (source, places), looked in looking.in_order(_batches(folder, "train")):
            ids: list[str] = []
            taken: list[Counts] = []
            for place, id_, one in zip(places, looked.ids, looked.found, strict=True):
                if isinstance(one, RecordError):
                    rejects.add(Record(folder / place.tar, None, id_), one.reason, str(one))
                    continue
                draw.offer(found.samples + len(taken), partial(looker.shown, source, place))
                taken.append(one)
                ids.append(id_)
            found.add(taken)
            out.extend(looked.rows, ids)
    ledger.balance(
        f"energon -> mixture, training samples of {folder}",
        expected,
        {"counted": found.samples, "rejected": rejects.count},
    )
    rejects.check(
        expected,
        looker.renderer.form["reject_limit"],
        str(folder),
        "mend the records, or name another template or instruction, or raise reject_limit of the format in "
        "config/",
    )
    if not found.samples:
        raise DataError(
            f"no sample of {folder} is left to train on", hint="a lower reject_limit of the format says why"
        )
    return found.counted(dataset, rejects.count)


@dataclass
class Found:
    """The counts of a dataset's samples, some at a time.

    Attributes:
        length: tokens that a sequence has room for.
        measures: how often each number comes, by measure.
        samples: how many there are.
        clipped: how many have more tokens than ``length``.
        unanswered: of how many no trained token is left.
    """

    length: int
    measures: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    samples: int = 0
    clipped: int = 0
    unanswered: int = 0

    def add(self, some: Sequence[Counts]) -> None:
        """Take in samples."""
        tokens, pictures, trained, images, original = (
            np.array(some, np.int64).reshape(-1, len(Counts._fields)).T
        )
        found = {
            "document_tokens": original,
            "n_tokens": tokens,
            "n_image_tokens": pictures,
            "n_text_tokens": tokens - pictures,
            "n_loss_tokens": trained,
            "n_images": images,
        }
        for key, numbers in found.items():
            self.measures[key].update(numbers.tolist())
        self.samples += len(some)
        self.clipped += int((original > tokens).sum())
        self.unanswered += int((trained == 0).sum())

    def counted(self, dataset: layout.Energon, refused: int) -> analysis.Counted:
        """The dataset, measured; beside what was taken in, so many were rejected."""
        counts = {
            "samples": self.samples,
            "rejected": refused,
            "clipped": self.clipped,
            "unanswered": self.unanswered,
        }
        measures = {key: Tally.counted(one) for key, one in self.measures.items()}
        return analysis.Counted(
            dataset, measures, counts, measures["n_tokens"].mean / self.length, self.length
        )


def _validating(
    names: Sequence[str],
    trained: Sequence[str],
    beside: Path,
    looking: Helpers[Batch, Printed],
) -> Path:
    """A folder with the prints of what validates: val splits, or all of what has none and does not train."""
    beside.mkdir(parents=True)
    with prints.Prints(beside) as out:
        for name in names:
            folder = Path(str(layout.Energon(dataset=name)))
            whole = name not in trained and not energon.splits(folder)["val"]
            for _, printed in looking.in_order(_batches(folder, "train" if whole else "val")):
                out.extend(*printed)
    return beside


def _printed(batch: Batch) -> Printed:
    """Read samples, and look what they are compared by."""
    dataset, places = batch
    samples = [(one, one.id) for one in map(dataset.sample, places)]
    return prints.rows(samples), [id_ for _, id_ in samples]


def _batches(folder: Path, split: str) -> Iterator[Batch]:
    """The samples of a split, as many at once as memory shall hold of them."""
    dataset = energon.Prepared.of(folder)
    some = batches(dataset.places(split), attrgetter("size"), most=SAMPLES, largest=BYTES)
    return ((dataset, places) for places in some)
