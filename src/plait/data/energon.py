"""Webdataset shards prepared for megatron-energon, without a question asked.

``energon prepare`` says nothing where it did nothing, splits by whole shards, accepts field names that do not
exist and merges samples of one key. Each of these is checked here, by what it wrote and by reading a sample.
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
from plait.data.webdataset import Written, asked, conversation, read_tar, to_sample, write
from plait.errors import ConfigError, DataError, RecordError

META = ".nv-meta"
SPLIT, DATASET, INFO = f"{META}/split.yaml", f"{META}/dataset.yaml", f"{META}/.info.json"
OLD_INFO = f"{META}/.info.yaml"
PARTS = ("train", "val", "test")
OLD_CLASS = re.compile(r"^(\w+)Webdataset$")
QUESTION_ANSWER = {"context": "json[question]", "answers": "txt"}
CONVERSATION = {"context": "json[0][value]", "answers": "json[1][value]"}
FIELDS = {"question_answer": QUESTION_ANSWER, "conversations": CONVERSATION}
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
        ConfigError: the split, the pattern or the field map cannot be.
        DataError: what was prepared is not what was written.
    """
    _check_split(settings)
    written = write(samples, folder, settings)
    kind = settings["sample_type"] or (VQA if written.simple else CRUDE)
    description = _description(kind, _fields(settings, written, kind))
    return _prepared(folder, written.shards, settings, description)


def adopt(folder: Path, origin: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Link a dataset that someone prepared, by whatever version of energon; prepare it anew beside.

    Its description and split are kept. Its own folder is not touched.

    Raises:
        DataError: it is not prepared, or holds a damaged tar, an undecodable picture or a doubled key.
    """
    if not (origin / DATASET).is_file():
        raise DataError(f"{origin} has no {DATASET}", hint="`energon prepare` makes it, or use kind tars")
    description = modern(read_yaml(origin / DATASET))
    shards = sorted(path for path in origin.rglob("*.tar") if META not in path.parts)
    counts: dict[str, int] = {}
    seen: set[str] = set()
    for path in shards:
        name = path.relative_to(origin).as_posix()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.resolve())
        counts[name] = _survey(path, seen)
    split = read_yaml(origin / SPLIT) if (origin / SPLIT).is_file() else {}
    exclude = set(split.get("exclude") or [])
    parts = {part: "|".join(map(re.escape, _expanded(names))) for part, names in _split_parts(split).items()}
    kept = {name: count for name, count in counts.items() if name not in exclude}
    wanted = {**settings, "split_parts": {k: v for k, v in parts.items() if v} or settings["split_parts"]}
    for name in exclude & counts.keys():
        (folder / name).unlink()
    return _prepared(folder, kept, wanted, description)


def _prepared(
    folder: Path, shards: Mapping[str, int], settings: Mapping[str, Any], description: dict[str, Any]
) -> dict[str, Any]:
    """Prepare tars and check what came of it; the facts."""
    if not shards:
        raise DataError(f"{folder.name} holds not one tar")
    clean(folder)
    _run(folder, settings)
    (folder / DATASET).write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    included = _included(shards, settings)
    _check_counts(folder, included)
    splits = {part: _expanded(names) for part, names in _split_parts(read_yaml(folder / SPLIT)).items()}
    found = {part: sum(included[name] for name in names) for part, names in splits.items()}
    if not found.get("train"):
        raise DataError(
            f"the split leaves no shard for training: {len(included)} shards, of which val has "
            f"{len(splits.get('val', []))} and test {len(splits.get('test', []))}",
            hint="whole shards are dealt out: lower samples_per_shard, or change split, in energon",
        )
    _check_readable(folder)
    log.info("%d shards, samples: %s", len(included), ", ".join(f"{n} {part}" for part, n in found.items()))
    return {"samples": sum(included.values()), "shards": dict(included), "splits": found}


def clean(folder: Path) -> None:
    """Remove what an earlier, perhaps failed, preparation left: energon would stumble over it."""
    files.remove(folder / META)
    for index in folder.rglob("*.tar.idx"):
        index.unlink()


def _run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Call ``energon prepare``; its own complaints become one sentence."""
    split = ["--split-ratio", ",".join(f"{share:g}" for share in settings["split"])]
    if settings["split_parts"]:
        split = [a for part in settings["split_parts"].items() for a in ("--split-parts", ":".join(part))]
    exclude = ["--exclude", settings["exclude"]] if settings["exclude"] else []
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder)]
    options = ["--non-interactive", "--no-progress", "--num-workers", "1", "--skip-dataset-yaml"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *options, *split, *exclude], capture_output=True, text=True, env=quiet, check=False
    )
    if done.returncode or not (folder / INFO).is_file():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise DataError(
            f"energon could not prepare {folder.name}: {said[-1].strip() if said else 'it said nothing'}",
            hint="look at split, split_parts and exclude of the dataset's energon keys",
        )


def _check_split(settings: Mapping[str, Any]) -> None:
    if not settings["split_parts"] and settings["split"][0] <= 0:
        raise ConfigError(
            f"energon.split {list(settings['split'])} gives training no share", hint="e.g. [9, 1, 0]"
        )
    for pattern in (*settings["split_parts"].values(), settings["exclude"]):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"energon: {pattern!r} is not a regular expression: {error}") from error


def _included(shards: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, int]:
    pattern = settings["exclude"]
    return {n: count for n, count in shards.items() if not pattern or not re.search(pattern, n)}


def _check_counts(folder: Path, shards: Mapping[str, int]) -> None:
    """Energon must have counted in every shard what was written to it."""
    counted = files.read_json(folder / INFO)["shard_counts"]
    for name, count in shards.items():
        if counted.get(name) != count:
            raise DataError(
                f"{name} holds {count} samples, energon counts {counted.get(name, 'none')}",
                hint="samples of one key that stand together are merged: give them keys of their own",
            )


def _survey(path: Path, seen: set[str]) -> int:
    """Count the samples of a tar, and look at every key and picture."""
    count = 0
    for key, parts in read_tar(path):
        if key in seen:
            raise DataError(f"{path}: the key {key!r} stands twice", hint="keys are unique in a dataset")
        seen.add(key)
        try:
            for picture in to_sample(parts, key).pictures:
                images.open_picture(picture)
        except RecordError as error:
            raise DataError(f"{path}: sample {key!r}: {error}", hint="mend it, or leave it out") from error
        count += 1
    if not count:
        raise DataError(f"{path} has no samples", hint="leave it out by `exclude`, or write it again")
    return count


def _fields(settings: Mapping[str, Any], written: Written, kind: str) -> dict[str, str]:
    if kind == CRUDE:
        return {}
    picture = {"image": ",".join(sorted(written.kinds))}
    return settings["field_map"] or {**picture, **FIELDS[settings["layout"]]}


def _description(kind: str, fields: Mapping[str, str]) -> dict[str, Any]:
    described: dict[str, Any] = {"__module__": "megatron.energon", "__class__": kind}
    if kind == CRUDE:
        return described
    return {"sample_type": described, "field_map": dict(fields)}


def modern(description: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset.yaml of any version as today's: ``VQAWebdataset`` named a class, now it is ``VQASample``."""
    name = OLD_CLASS.match(str(description.get("__class__", "")))
    if name is None or name[1] == "Crude":
        return dict(description)
    rest = {k: v for k, v in description.items() if k not in {"__module__", "__class__"}}
    return {"sample_type": {"__module__": "megatron.energon", "__class__": f"{name[1]}Sample"}, **rest}


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


def read(folder: Path, split: str = "train") -> Iterator[Sample]:
    """Every sample of a split once, in file order, as training sees it; pictures as encoded bytes.

    Raises:
        DataError: the dataset is not prepared, a shard is damaged, or a sample has not the fields that
            its description names.
    """
    description = read_yaml(folder / DATASET)
    for name in _expanded(_split_parts(read_yaml(folder / SPLIT)).get(split, [])):
        for key, parts in read_tar(folder / name):
            try:
                yield of_parts(parts, key, description)
            except RecordError as error:
                raise DataError(f"{folder / name}: sample {key!r}: {error}") from error


def of_parts(parts: Mapping[str, Any], key: str, description: Mapping[str, Any]) -> Sample:
    """A conversation from a tar entry, by the dataset's field map; whole where it has none.

    Raises:
        RecordError: a field is not there.
    """
    fields = description.get("field_map")
    if not fields:
        return to_sample(parts, key)
    decoded = dict(parts)
    if isinstance(parts.get("json"), bytes):
        try:
            decoded["json"] = json.loads(parts["json"])
        except ValueError as error:
            raise RecordError(f"{key}.json is not JSON: {error}", reason="bad_json") from error
    values = {field: _access(decoded, path) for field, path in fields.items()}
    return of_fields(values, key)


def of_fields(values: Mapping[str, Any], key: str) -> Sample:
    """A conversation from the fields of a VQASample: image, context, answers.

    ``context`` may be a whole list of turns: a field map of ``context: json`` keeps all of them.
    """
    pictures = [values["image"]] if values.get("image") is not None else []
    context, answers = values.get("context", ""), values.get("answers")
    if isinstance(context, list):
        return conversation(context, pictures, key)
    answer = answers[0] if isinstance(answers, list) and answers else answers
    answer = answer.decode() if isinstance(answer, bytes) else answer
    if not isinstance(answer, str) or not isinstance(context, str):
        raise RecordError(f"{key}: question and answer are not both text", reason="not_text")
    return asked(context, answer, pictures, key)


def _access(parts: Mapping[str, Any], path: str) -> Any:
    """The value of ``json[0][value]`` or ``jpg,png``."""
    for alternative in path.split(","):
        name, *steps = re.split(r"\[|\]\[?", alternative.strip().rstrip("]"))
        if name not in parts:
            continue
        value = parts[name]
        for step in steps:
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise RecordError(f"there is no {alternative}", reason="missing_field") from error
        return value
    raise RecordError(f"there is no part {path}", reason="missing_field")


def _split_parts(split: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = split.get("split_parts") or {}
    return found


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
        if _split_parts(read_yaml(Path(path) / SPLIT)).get("val")
    ]
    splits = {"train": {"blend": train}, **({"val": {"blend": checked}} if checked else {})}
    return {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}


def _check_readable(folder: Path) -> None:
    """Read samples through energon itself: only then does it look at the field map.

    Raises:
        DataError: energon cannot read one, or reads something else than the tar has.
    """
    script = [sys.executable, "-m", "plait.data.probe", str(folder)]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=quiet, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise DataError(
            f"energon cannot read {folder.name} as described: {said[-1] if said else 'it said nothing'}",
            hint="look at field_map and sample_type of the dataset's energon keys",
        )
