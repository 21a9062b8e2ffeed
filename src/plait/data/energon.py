"""Webdataset shards prepared for megatron-energon, without a question asked.

Samples of ours are indexed as they are written (:mod:`plait.data.prepare`). Tars of others are prepared and
read by energon itself: it says nothing where it did nothing, splits by whole shards, accepts field names that
do not exist and merges samples of one key. Each of these is checked here, by what it wrote and by reading
samples.
"""

import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from plait import files
from plait.config.paths import SPLIT
from plait.data import images, ledger, llava, meta, prepare, probe
from plait.data.chat import Sample
from plait.data.fields import WHOLE_TALK, check_whole, of_parts
from plait.data.meta import CRUDE, DATASET, INFO, LEFT_OUT, META, PARTS, VQA
from plait.data.rejects import NAME, Record, Rejects, to_json
from plait.data.tars import Parts, parts_at, places, read_tar
from plait.data.webdataset import PICTURE_PART, Written, nth, write
from plait.errors import ConfigError, DataError, RecordError

GIVEN_SPLIT = f"{META}/given.yaml"
"""A split that is known before energon deals one out, and takes its place."""
QUESTION_ANSWER = {"context": "json[question]", "answers": "txt"}
CONVERSATION = {"context": "json[0][value]", "answers": "json[1][value]"}
FIELDS = {"question_answer": QUESTION_ANSWER, "conversations": CONVERSATION}
FAR = 0.2
"""A part's share of the samples that differs by more from what ``split`` asks is worth a line."""

log = logging.getLogger(__name__)


# Making


def build(
    folder: Path,
    samples: Iterable[Sample | None],
    settings: Mapping[str, Any],
    where: Callable[[int], Record] = nth,
    duplicates: str = "count",
) -> dict[str, Any]:
    """Write and prepare a dataset in an empty folder; the facts of its manifest.

    Args:
        folder: where it goes.
        samples: conversations with ids; None for each that is of the other part.
        settings: ``datasets.*.energon`` of the config.
        where: says where the sample of a number came from.
        duplicates: ``datasets.*.duplicates`` of the config.

    Raises:
        ConfigError: the samples are not of the sample type, or have no use for a field map.
        DataError: what was prepared is not what was written, or more is rejected than ``reject_limit``.
    """
    clean(folder)
    with prepare.Index(folder) as index:
        written = write(samples, folder, settings, where, duplicates, index.note)
        facts = _described(folder, index, written, settings)
    excluded = sum(written.shards.values()) - facts["samples"]
    return _with_rejects({**facts, "excluded": excluded, "other_part": written.others}, written.rejected)


def _described(
    folder: Path, index: prepare.Index, written: Written, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what describes tars of ours, and check that they can be read by it; the facts."""
    included = _included(folder, written.shards, settings)
    description = _description(folder, written, settings)
    meta.write_yaml(folder / DATASET, description)
    index.save(included, prepare.dealt(sorted(included), settings))
    shares = _shares(folder, included)
    if settings["field_map"]:
        _check_readable(folder)
    return _facts(included, shares, settings)


def _description(folder: Path, written: Written, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a dataset's dataset.yaml."""
    fields = _fields(written, settings)
    fits = not written.larger or fields["context"] == WHOLE_TALK
    kind = settings["sample_type"] or (VQA if fits else CRUDE)
    one = f"one picture, one question and one answer; {written.larger!r} of {folder} has more"
    if kind == VQA and not fits:
        raise ConfigError(
            f"energon.sample_type VQASample holds {one}",
            hint="leave sample_type out: then samples are read whole",
        )
    if kind == CRUDE and settings["field_map"]:
        what = f"samples of {one}" if written.larger else "a VQASample, and sample_type is CrudeWebdataset"
        raise ConfigError(
            f"energon.field_map describes {what}: samples are read whole and nothing would heed it",
            hint="leave field_map out, or keep only samples of one picture and one exchange",
        )
    return meta.description(kind, fields)


def _check_readable(folder: Path) -> None:
    """Read all by a field map of the user's; that of a layout reads what is written in it."""
    try:
        for part in PARTS:
            deque(read(folder, part), maxlen=0)
    except DataError as error:
        raise _unreadable(folder, str(error)) from error


def _unreadable(folder: Path, why: str) -> DataError:
    return DataError(
        f"energon cannot read {folder} as described: {why}",
        hint="look at field_map and sample_type of the dataset's energon keys",
    )


def outcomes(facts: Mapping[str, Any]) -> dict[str, int]:
    """What became of the records that a dataset was made from, by its facts."""
    rejected = sum(facts["rejected"].values())
    apart = {key: facts.get(key, 0) for key in ("excluded", "other_part")}
    return {**facts["splits"], **apart, "rejected": rejected}


def _with_rejects(facts: dict[str, Any], rejected: Mapping[str, int]) -> dict[str, Any]:
    """The facts of a dataset with what became of all that was read: rejected + excluded + samples = read."""
    read = facts["samples"] + facts.get("excluded", 0) + sum(rejected.values())
    return {**facts, "read": read, "rejected": dict(rejected)}


def _fields(written: Written, settings: Mapping[str, Any]) -> dict[str, str]:
    """The layout's field map, and over it the given one.

    Where a given ``image: jpg`` is one kind of the pictures, the other kinds are its alternatives.
    """
    kinds, given = sorted(written.kinds), settings["field_map"]
    fields = {"image": ",".join(kinds), **FIELDS[settings["layout"]], **given}
    named = fields["image"].split(",")
    if not set(kinds).isdisjoint(named) and all(map(PICTURE_PART.fullmatch, named)):
        fields["image"] = ",".join(dict.fromkeys([*named, *kinds]))
    return fields


def adopt(folder: Path, origin: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Link a dataset that someone prepared, by whatever version of energon; prepare it anew beside.

    Its description and split are kept; ``sample_type``, ``field_map``, ``split_parts`` and ``exclude`` of the
    settings go first. Its own folder is not touched.

    Raises:
        DataError: it is not prepared, or holds a damaged tar or a doubled key, or has not the samples that it
            had, or more of them are rejected than ``reject_limit`` allows.
    """
    if not (origin / DATASET).is_file():
        raise DataError(f"{origin} has no {DATASET}", hint="`energon prepare` makes it, or use kind tars")
    description = meta.modern(meta.read_yaml(origin / DATASET), origin, settings)
    split = None
    if (origin / SPLIT).is_file() and not settings["split_parts"]:
        split = meta.read_split(origin / SPLIT)
    for name, path in shards_below(origin, split).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.resolve())
    survey = surveyed(origin, settings, description, split)
    survey.close(folder, settings["reject_limit"])
    facts = prepared(folder, survey.counts, settings, description, _given(split, survey.counts, settings))
    rejected = to_json(survey.reasons)
    found = _with_rejects({**facts, "samples": facts["samples"] - sum(rejected.values())}, rejected)
    ledger.balance(f"tars -> energon, {folder}", survey.judged, outcomes(found))
    return found


def shards_below(folder: Path, split: meta.Split | None = None) -> dict[str, Path]:
    """The tars of a folder and those below it, by name; without those that a split leaves out."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*.tar"))
        if META not in path.parts
    }
    return {name: path for name, path in found.items() if split is None or name not in split.left_out}


def surveyed(
    origin: Path, settings: Mapping[str, Any], description: Mapping[str, Any], split: meta.Split | None = None
) -> "Survey":
    """A look at every key, field and picture of each tar that is not left out.

    Args:
        origin: whose tars they are; where someone has counted their samples, they must be as many now.
        settings: ``datasets.*.energon`` of the config.
        description: the content of dataset.yaml.
        split: that of split.yaml, which must fit the tars.

    Raises:
        DataError: a tar is damaged, a key is doubled, or shards or samples are not those of the split and of
            the counts.
    """
    counted, survey = meta.shard_counts(origin), Survey(description, split.left_out if split else frozenset())
    for name, path in shards_below(origin, split).items():
        if not _excluded(name, settings):
            survey.count(path, name)
    if split is not None:
        meta.check_split(meta.Split(_kept(split, settings), split.left_out), survey.counts, origin / SPLIT)
    meta.check_counts({n: c for n, c in counted.items() if not _excluded(n, settings)}, survey.counts, origin)
    return survey


def prepared(
    folder: Path,
    shards: Mapping[str, int],
    settings: Mapping[str, Any],
    description: Mapping[str, Any],
    split: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Let energon prepare tars of others, and check what came of it; the facts.

    Args:
        folder: where the tars are.
        shards: samples of each tar, without those that are left out.
        settings: ``datasets.*.energon`` of the config.
        description: the content of dataset.yaml.
        split: that of split.yaml, where it is known already.
    """
    included = _included(folder, shards, settings)
    clean(folder)
    meta.write_yaml(folder / DATASET, description)
    if split is not None:
        meta.write_yaml(folder / GIVEN_SPLIT, split)
    found = _run(folder, settings)
    _check_counts(folder, included)
    _shares(folder, included)
    if found["wrong"]:
        raise _unreadable(folder, found["wrong"])
    return _facts(included, found["splits"], settings, dealt_out=split is None)


def _included(folder: Path, shards: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, int]:
    """Samples of each tar that ``exclude`` does not leave out.

    Raises:
        DataError: there is none.
    """
    included = {name: count for name, count in shards.items() if not _excluded(name, settings)}
    if not included:
        raise DataError(
            f"{folder} has no tar, or energon.exclude leaves all of them out",
            hint="look at exclude of the dataset's energon keys",
        )
    return included


def _shares(folder: Path, included: Mapping[str, int]) -> dict[str, int]:
    """Samples of the tars of each part, as split.yaml deals them out.

    Raises:
        DataError: nothing is left for training, or a tar is in no part, or in two.
    """
    divided = meta.read_split(folder / SPLIT)
    dealt = divided.parts
    if not dealt["train"]:
        raise DataError(
            f"the split leaves no shard for training: {len(included)} shards, of which val has "
            f"{len(dealt['val'])} and test {len(dealt['test'])}",
            hint="whole shards are dealt out: lower samples_per_shard, or change split, in energon",
        )
    meta.check_split(divided, included, f"the split of {folder}")
    return {part: sum(included[name] for name in names) for part, names in dealt.items()}


def _facts(
    included: Mapping[str, int],
    shares: Mapping[str, int],
    settings: Mapping[str, Any],
    *,
    dealt_out: bool = True,
) -> dict[str, Any]:
    """The facts of a prepared dataset; ``shares`` are the samples of each part."""
    if not settings["split_parts"] and dealt_out:
        _compare_shares(shares, settings["split"], len(included))
    said = ", ".join(f"{number} {part}" for part, number in shares.items())
    log.info("%d shards, samples: %s", len(included), said)
    return {"samples": sum(included.values()), "shards": dict(included), "splits": dict(shares)}


def clean(folder: Path) -> None:
    """Remove what an earlier, perhaps failed, preparation left: energon would stumble over it."""
    files.remove(folder / META)
    for index in folder.rglob("*.tar.idx"):
        index.unlink()


def _run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare and read through energon, in a process; its complaints become one sentence.

    Returns:
        What :mod:`plait.data.probe` found.
    """
    chosen = ["--split-ratio", ",".join(f"{share:g}" for share in settings["split"])]
    if settings["split_parts"]:
        pairs = (":".join(part) for part in settings["split_parts"].items())
        chosen = [word for pair in pairs for word in ("--split-parts", pair)]
    exclude = ["--exclude", settings["exclude"]] if settings["exclude"] else []
    found = probe.run(folder, *chosen, *exclude)
    if "failed" in found:
        raise DataError(
            f"energon could not prepare {folder}: {found['failed']}",
            hint="look at split, split_parts and exclude of the dataset's energon keys",
        )
    return found


def _compare_shares(found: Mapping[str, int], wanted: Iterable[float], shards: int) -> None:
    """Say so where whole shards cannot be dealt out as ``split`` asks."""
    asked, total = dict(zip(PARTS, wanted, strict=True)), sum(found.values())
    shares = {part: (found[part] / total, asked[part] / sum(asked.values())) for part in PARTS}
    if any(abs(real - ideal) > FAR or (ideal and not real) for real, ideal in shares.values()):
        log.warning(
            "samples are dealt out %s to %s, not %s as `split` asks, for there are %d shards: "
            "lower samples_per_shard of the dataset's energon keys",
            " : ".join(f"{real:.0%}" for real, _ in shares.values()),
            ", ".join(PARTS),
            " : ".join(f"{ideal:.0%}" for _, ideal in shares.values()),
            shards,
        )


def _excluded(name: str, settings: Mapping[str, Any]) -> bool:
    return bool(settings["exclude"] and re.search(settings["exclude"], name))


def _kept(split: meta.Split, settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parts of a split without the shards that ``exclude`` leaves out."""
    return {part: [n for n in names if not _excluded(n, settings)] for part, names in split.parts.items()}


def _given(
    split: meta.Split | None, counts: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Someone's split as energon takes it; shards left out are left out of it."""
    if split is None:
        return None
    single = sorted(n for n in split.left_out if any(str(p) in counts for p in PurePosixPath(n).parents))
    return {"split_parts": _kept(split, settings), "exclude": single}


def _check_counts(folder: Path, shards: Mapping[str, int]) -> None:
    """Energon must have counted in every shard what was written to it."""
    counted = files.read_json(folder / INFO)["shard_counts"]
    for name, count in shards.items():
        if counted.get(name) != count:
            raise DataError(
                f"{name} holds {count} samples, energon counts {counted.get(name, 'none')}",
                hint="samples of one key that stand together are merged: give them keys of their own",
            )


@dataclass
class Survey:
    """Looks at every key, field and picture of someone's tars.

    Attributes:
        description: how the fields of a sample are read.
        left_out: samples that their split leaves out, by ``SHARD/KEY``: nobody reads them.
        judged: how many others there are.
        counts: samples of each tar, rejected ones among them.
    """

    description: Mapping[str, Any]
    left_out: frozenset[str]
    judged: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    found: list[tuple[str, Record, RecordError]] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """How many samples are rejected, by reason."""
        return Counter(error.reason for _, _, error in self.found)

    def count(self, path: Path, name: str) -> None:
        """Look at a tar and count its samples.

        Raises:
            DataError: it has none, or a key stands twice.
        """
        count = 0
        for key, parts in read_tar(path):
            if key in self.seen:
                raise DataError(f"{path}: the key {key!r} stands twice", hint="keys are unique in a dataset")
            self.seen.add(key)
            count += 1
            if f"{name}/{key}" in self.left_out:
                continue
            self.judged += 1
            try:
                self._look(key, parts)
            except RecordError as error:
                self.found.append((f"{name}/{key}", Record(path, None, key), error))
        if not count:
            raise DataError(f"{path} has no samples", hint="leave it out by `exclude`, or write it again")
        self.counts[name] = count

    def _look(self, key: str, parts: Parts) -> None:
        sample = llava.checked(of_parts(parts, key, self.description))
        check_whole(sample, parts, self.description.get("field_map"))
        for picture in sample.pictures:
            images.upright(picture)

    def refuse_rejects(self) -> None:
        """Where nothing of someone's may be left out.

        Raises:
            DataError: a sample is rejected; the first is named.
        """
        for _, record, error in self.found[:1]:
            raise DataError(f"{record}: {error}", hint="mend it, or leave it out")

    def close(self, folder: Path, limit: float) -> None:
        """Write down what is rejected, and leave it out of every split.

        Raises:
            DataError: it is more than ``limit`` allows, or cannot be named in a split.
        """
        with (folder / NAME).open("wb") as out:
            rejected = Rejects(out)
            for _, record, error in self.found:
                rejected.add(record, error.reason, str(error))
        hint = "mend the tars, or change field_map, sample_type or reject_limit of the dataset's energon keys"
        rejected.check(self.judged, limit, str(folder), hint)
        names = [name for name, _, _ in self.found]
        odd = [name for name in names if set(name) & set("{}\\")]
        if odd:
            raise DataError(f"{odd[0]} cannot be left out of a split: its name has braces", hint=hint)
        if names:
            meta.write_yaml(folder / LEFT_OUT, {"exclude": names})


# Reading


def read(folder: Path, split: str = "train") -> Iterator[Sample]:
    """Every sample of a split once, in file order, as training sees it; pictures as encoded bytes.

    Raises:
        DataError: the dataset is not prepared, a shard is damaged, or a sample has not the fields that
            its description names.
    """
    dataset = Prepared.of(folder)
    return map(dataset.sample, dataset.places(split))


@dataclass(frozen=True)
class Place:
    """Where a sample stands: its tar, its key there, and offset and length of the bytes of each part."""

    tar: str
    key: str
    parts: Mapping[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of its parts."""
        return sum(size for _, size in self.parts.values())


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset: its folder, and what its dataset.yaml says of the fields of a sample."""

    folder: Path
    description: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read what describes it.

        Raises:
            DataError: it is not prepared.
        """
        return cls(folder, meta.read_yaml(folder / DATASET))

    def places(self, split: str = "train") -> Iterator[Place]:
        """Every sample of a split once, in file order.

        Raises:
            DataError: the dataset is not prepared, or a shard is damaged.
        """
        divided = meta.read_split(self.folder / SPLIT)
        for name in divided.parts[split]:
            for key, parts in places(self.folder / name):
                if f"{name}/{key}" not in divided.left_out:
                    yield Place(name, key, parts)

    def sample(self, place: Place) -> Sample:
        """Read one.

        Raises:
            DataError: it has not the fields that the description names, or its tar has become shorter.
        """
        tar = self.folder / place.tar
        try:
            return of_parts(parts_at(tar, place.parts), place.key, self.description)
        except RecordError as error:
            raise DataError(f"{tar}: sample {place.key!r}: {error}") from error


def splits(folder: Path) -> dict[str, list[str]]:
    """The shards of each part of a prepared dataset."""
    return dict(meta.read_split(folder / SPLIT).parts)


def blend(
    sources: Mapping[str, float], validation: Sequence[str] = (), *, relative_to: Path
) -> dict[str, Any]:
    """Energon's metadataset: the training blend, and a validation one.

    Args:
        sources: weight by the path of a dataset.
        validation: datasets that validate, by their val split; one that does not train and has none does so
            as a whole. Where none is given, the val splits of the sources.
        relative_to: the folder of the file; energon takes paths from there.

    Raises:
        DataError: a dataset would validate what it trains.
    """

    def part(path: str, **more: Any) -> dict[str, Any]:
        return {"path": os.path.relpath(path, relative_to), **more}

    train = [part(path, weight=weight) for path, weight in sources.items()]
    weights = dict.fromkeys(validation, 1.0) or sources
    held = {path: bool(splits(Path(path))["val"]) for path in weights}
    both = [path for path in validation if path in sources and not held[path]]
    if both:
        raise DataError(
            f"{both[0]} trains, and has no val split that could validate",
            hint="change split of its energon keys, or leave it out of the mixture's validation",
        )
    checked = [
        part(path, weight=weight, split_part="val" if held[path] else "train")
        for path, weight in weights.items()
        if held[path] or path not in sources
    ]
    parts = {"train": {"blend": train}, **({"val": {"blend": checked}} if checked else {})}
    return {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": parts}
