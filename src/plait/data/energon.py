"""Webdataset shards prepared for megatron-energon, without a question asked.

``energon prepare`` says nothing where it did nothing, splits by whole shards, accepts field names that do not
exist and merges samples of one key. Each of these is checked here, by what it wrote and by reading samples.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from plait import files
from plait.data import images
from plait.data.chat import Sample
from plait.data.webdataset import Parts, asked, conversation, decoded, read_tar, to_sample, write
from plait.errors import ConfigError, DataError, RecordError

META = ".nv-meta"
SPLIT, DATASET, INFO = f"{META}/split.yaml", f"{META}/dataset.yaml", f"{META}/.info.json"
GIVEN_SPLIT = f"{META}/given.yaml"
"""A split that is known before energon deals one out, and takes its place."""
PARTS = ("train", "val", "test")
OLD_CLASS = re.compile(r"(\w+)Webdataset")
FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
"""A part of a tar entry, and where in its JSON: ``json[0][value]``."""
QUESTION_ANSWER = {"context": "json[question]", "answers": "txt"}
CONVERSATION = {"context": "json[0][value]", "answers": "json[1][value]"}
FIELDS = {"question_answer": QUESTION_ANSWER, "conversations": CONVERSATION}
WHOLE_TALK = "json"
"""A context that is the whole list of turns."""
CRUDE, VQA = "CrudeWebdataset", "VQASample"

log = logging.getLogger(__name__)


# Making


def build(folder: Path, samples: Iterable[Sample], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write and prepare a dataset in an empty folder; the facts of its manifest.

    Args:
        folder: where it goes.
        samples: conversations with ids.
        settings: ``datasets.*.energon`` of the config.

    Raises:
        ConfigError: the split, a pattern, the shards' name or the sample type cannot be.
        DataError: what was prepared is not what was written.
    """
    _check_patterns(settings)
    written = write(samples, folder, settings)
    kind = settings["sample_type"] or (VQA if written.simple else CRUDE)
    images_ = {"image": ",".join(sorted(written.kinds))}
    fields = settings["field_map"] or {**images_, **FIELDS[settings["layout"]]}
    if kind == VQA and not written.simple and fields.get("context") != WHOLE_TALK:
        raise ConfigError(
            "energon.sample_type VQASample holds one picture, one question and one answer; samples of "
            f"{files.final_name(folder)} have more",
            hint="leave sample_type out: then samples are read whole",
        )
    return _prepared(folder, written.shards, settings, _description(kind, fields))


def adopt(folder: Path, origin: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Link a dataset that someone prepared, by whatever version of energon; prepare it anew beside.

    Its description and split are kept; ``split_parts`` and ``exclude`` of the settings go first. Its own
    folder is not touched.

    Raises:
        DataError: it is not prepared, or holds a damaged tar, an undecodable picture or a doubled key.
    """
    _check_patterns(settings)
    if not (origin / DATASET).is_file():
        raise DataError(f"{origin} has no {DATASET}", hint="`energon prepare` makes it, or use kind tars")
    description = modern(read_yaml(origin / DATASET), origin)
    counts: dict[str, int] = {}
    seen: set[str] = set()
    for path in sorted(path for path in origin.rglob("*.tar") if META not in path.parts):
        name = path.relative_to(origin).as_posix()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.resolve())
        if not _excluded(name, settings):
            counts[name] = _survey(path, seen, description)
    split = None
    if (origin / SPLIT).is_file() and not settings["split_parts"]:
        split = _check_split(read_yaml(origin / SPLIT), counts, settings, origin)
    return _prepared(folder, counts, settings, description, split)


def _prepared(
    folder: Path,
    shards: Mapping[str, int],
    settings: Mapping[str, Any],
    description: Mapping[str, Any],
    split: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Prepare tars and check what came of it; the facts.

    Args:
        folder: where the tars are.
        shards: samples of each tar, without those that are left out.
        settings: ``datasets.*.energon`` of the config.
        description: the content of dataset.yaml.
        split: that of split.yaml, where it is known already.
    """
    included = {name: count for name, count in shards.items() if not _excluded(name, settings)}
    if not included:
        raise DataError(
            f"{files.final_name(folder)} has no tar, or energon.exclude leaves all of them out",
            hint="look at exclude of the dataset's energon keys",
        )
    clean(folder)
    _write_yaml(folder / DATASET, description)
    if split is not None:
        _write_yaml(folder / GIVEN_SPLIT, split)
    found = _run(folder, settings)
    _check_counts(folder, included)
    dealt = {part: len(_shards(read_yaml(folder / SPLIT), part)) for part in PARTS}
    if not dealt["train"]:
        raise DataError(
            f"the split leaves no shard for training: {len(included)} shards, of which val has "
            f"{dealt['val']} and test {dealt['test']}",
            hint="whole shards are dealt out: lower samples_per_shard, or change split, in energon",
        )
    if found["wrong"]:
        raise DataError(
            f"energon cannot read {files.final_name(folder)} as described: {found['wrong']}",
            hint="look at field_map and sample_type of the dataset's energon keys",
        )
    said = ", ".join(f"{number} {part}" for part, number in found["splits"].items())
    log.info("%d shards, samples: %s", len(included), said)
    return {"samples": sum(included.values()), "shards": included, "splits": found["splits"]}


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
    command = [sys.executable, "-m", "plait.data.probe", str(folder), *chosen, *exclude]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
    )
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode or not (folder / INFO).is_file():
        last = said[-1] if said else "it said nothing"
        raise DataError(
            f"energon could not prepare {files.final_name(folder)}: {last}",
            hint="look at split, split_parts and exclude of the dataset's energon keys",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _check_patterns(settings: Mapping[str, Any]) -> None:
    if not settings["split_parts"] and settings["split"][0] <= 0:
        raise ConfigError(
            f"energon.split {list(settings['split'])} gives training no share", hint="e.g. [9, 1, 0]"
        )
    for pattern in (*settings["split_parts"].values(), settings["exclude"]):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"energon: {pattern!r} is not a regular expression: {error}") from error


def _excluded(name: str, settings: Mapping[str, Any]) -> bool:
    return bool(settings["exclude"] and re.search(settings["exclude"], name))


def _check_split(
    split: Mapping[str, Any], counts: Mapping[str, int], settings: Mapping[str, Any], origin: Path
) -> dict[str, Any]:
    """Someone's split.yaml, if every shard that it names is there; shards left out are left out of it."""
    wanted = {part: [n for n in _shards(split, part) if not _excluded(n, settings)] for part in PARTS}
    for name in (name for names in wanted.values() for name in names):
        if name not in counts:
            raise DataError(f"{origin / SPLIT} names {name}, which is not there", hint="prepare it again")
    single = [name for name in _expanded(split.get("exclude") or []) if "/" in name]
    return {"split_parts": wanted, "exclude": single}


def _check_counts(folder: Path, shards: Mapping[str, int]) -> None:
    """Energon must have counted in every shard what was written to it."""
    counted = files.read_json(folder / INFO)["shard_counts"]
    for name, count in shards.items():
        if counted.get(name) != count:
            raise DataError(
                f"{name} holds {count} samples, energon counts {counted.get(name, 'none')}",
                hint="samples of one key that stand together are merged: give them keys of their own",
            )


def _survey(path: Path, seen: set[str], description: Mapping[str, Any]) -> int:
    """Count the samples of a tar, and look at every key, field and picture."""
    count = 0
    for key, parts in read_tar(path):
        if key in seen:
            raise DataError(f"{path}: the key {key!r} stands twice", hint="keys are unique in a dataset")
        seen.add(key)
        try:
            for picture in of_parts(parts, key, description).pictures:
                images.open_picture(picture)
        except RecordError as error:
            raise DataError(f"{path}: sample {key!r}: {error}", hint="mend it, or leave it out") from error
        count += 1
    if not count:
        raise DataError(f"{path} has no samples", hint="leave it out by `exclude`, or write it again")
    return count


def _description(kind: str, fields: Mapping[str, str]) -> dict[str, Any]:
    described: dict[str, Any] = {"__module__": "megatron.energon", "__class__": kind}
    return described if kind == CRUDE else {"sample_type": described, "field_map": dict(fields)}


def modern(description: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """A dataset.yaml of any version as today's: ``VQAWebdataset`` named a class, now it is ``VQASample``.

    Nothing else is taken over: energon would import modules and run functions that are named there.

    Raises:
        DataError: it is of another class, or has no field map.
    """
    named = description.get("sample_type") or description
    name = str(named.get("__class__") if isinstance(named, dict) else named)
    old = OLD_CLASS.fullmatch(name)
    kind = f"{old[1]}Sample" if old and name != CRUDE else name
    fields = description.get("field_map")
    if kind not in (VQA, CRUDE) or (kind == VQA and not isinstance(fields, dict)):
        raise DataError(
            f"{origin / DATASET} describes a {name}{'' if fields else ' without field_map'}; plait reads "
            f"{VQA} by a field_map, and {CRUDE}",
            hint="describe image, context and answers of a VQASample by a field_map, or use kind tars",
        )
    return _description(kind, fields or {})


# Reading


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of energon's.

    Raises:
        DataError: it is missing, or is not YAML.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="prepare the dataset again") from error
    return found if isinstance(found, dict) else {}


def _write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(dict(value), sort_keys=False), encoding="utf-8")


def read(folder: Path, split: str = "train") -> Iterator[Sample]:
    """Every sample of a split once, in file order, as training sees it; pictures as encoded bytes.

    Raises:
        DataError: the dataset is not prepared, a shard is damaged, or a sample has not the fields that
            its description names.
    """
    description, divided = read_yaml(folder / DATASET), read_yaml(folder / SPLIT)
    left_out = set(_expanded(divided.get("exclude") or []))
    for name in _shards(divided, split):
        for key, parts in read_tar(folder / name):
            if f"{name}/{key}" in left_out:
                continue
            try:
                yield of_parts(parts, key, description)
            except RecordError as error:
                raise DataError(f"{folder / name}: sample {key!r}: {error}") from error


def splits(folder: Path) -> dict[str, list[str]]:
    """The shards of each part of a prepared dataset."""
    divided = read_yaml(folder / SPLIT)
    return {part: _shards(divided, part) for part in PARTS}


def of_parts(parts: Parts, key: str, description: Mapping[str, Any]) -> Sample:
    """A conversation from a tar entry, by the dataset's field map; whole where it has none.

    Raises:
        RecordError: a field is not there.
    """
    fields = description.get("field_map")
    if not fields:
        return to_sample(parts, key)
    values = {name: decoded(name, content, key) for name, content in parts.items()}
    return of_fields({field: _access(values, path) for field, path in fields.items()}, key)


def of_fields(values: Mapping[str, Any], key: str) -> Sample:
    """A conversation from the fields of a VQASample: image, context, answers.

    ``context`` may be a whole list of turns: a field map of ``context: json`` keeps all of them. Of several
    answers the first is taken.

    Raises:
        RecordError: a field is of another kind.
    """
    pictures = [values["image"]] if values.get("image") is not None else []
    if not all(isinstance(picture, bytes) for picture in pictures):
        raise RecordError(f"{key}: image is no part of the tar", reason="not_a_picture")
    context, answers = values.get("context", ""), values.get("answers")
    if isinstance(context, list):
        return conversation(context, pictures, key)
    return asked(context, answers[0] if isinstance(answers, list) and answers else answers, pictures, key)


def _access(parts: Mapping[str, Any], path: str) -> Any:
    """The value of ``json[0][value]`` or ``jpg,png``: the first of the alternatives that is there."""
    for alternative in path.split(","):
        found = FIELD.fullmatch(alternative)
        steps = [found[1], *re.findall(r"[^\[\]]+", found[2])] if found else [alternative]
        value: Any = parts
        try:
            for step in steps:
                value = value[int(step) if isinstance(value, list) else step]
        except (LookupError, TypeError, ValueError):
            continue
        return value
    raise RecordError(f"there is no part {path}", reason="missing_field")


def _shards(split: Mapping[str, Any], part: str) -> list[str]:
    """The shards of a part, without those that are left out."""
    names = _expanded((split.get("split_parts") or {}).get(part) or [])
    left_out = set(_expanded(split.get("exclude") or []))
    return [name for name in names if name not in left_out]


def _expanded(names: Iterable[str]) -> list[str]:
    """The shards that braces stand for: ``{000000..000003}.tar``."""
    from braceexpand import braceexpand

    return [one for name in names for one in braceexpand(name)]


def blend(
    sources: Mapping[str, float], validation: Iterable[str] = (), *, relative_to: Path
) -> dict[str, Any]:
    """Energon's metadataset: the training blend, and a validation one.

    Args:
        sources: weight by the path of a dataset.
        validation: datasets whose train split validates; none: the val splits of the sources.
        relative_to: the folder of the file; energon takes paths from there.
    """

    def part(path: str, **more: Any) -> dict[str, Any]:
        return {"path": os.path.relpath(path, relative_to), **more}

    train = [part(path, weight=weight) for path, weight in sources.items()]
    checked = [part(path, weight=1.0, split_part="train") for path in validation] or [
        part(path, weight=weight, split_part="val")
        for path, weight in sources.items()
        if splits(Path(path))["val"]
    ]
    parts = {"train": {"blend": train}, **({"val": {"blend": checked}} if checked else {})}
    return {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": parts}
