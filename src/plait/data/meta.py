"""What stands in a dataset's ``.nv-meta``: its description, its split and its counts, by whatever version.

Others wrote it: only fields of samples and names of shards are taken over, and what is shaped otherwise is
a sentence. Energon would import modules and run functions that are named there.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait import files
from plait.errors import DataError

META = ".nv-meta"
DATASET = f"{META}/dataset.yaml"
INFO, OLD_INFO = f"{META}/.info.json", f"{META}/.info.yaml"
LEFT_OUT = "left_out.yaml"
"""Samples that no split is to have, until one is dealt out."""
PARTS = ("train", "val", "test")
CRUDE, VQA = "CrudeWebdataset", "VQASample"
OLD_CLASS = re.compile(r"(\w+)Webdataset")
NEEDED, POSSIBLE = ("image", "context"), ("image", "context", "answers", "answer_weights")
"""Fields of a VQASample that a field map must name, and that it may name."""
SHOWN = 3
"""Shards that a sentence names."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of energon's.

    Raises:
        DataError: it is missing, or is not YAML.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="prepare the dataset again") from error
    return found if isinstance(found, dict) else {}


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Write one of energon's YAML files."""
    import yaml

    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(dict(value), sort_keys=False), encoding="utf-8")


# The description


def description(kind: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The content of dataset.yaml."""
    described: dict[str, Any] = {"__module__": "megatron.energon", "__class__": kind}
    return described if kind == CRUDE else {"sample_type": described, "field_map": dict(fields)}


def modern(found: Mapping[str, Any], origin: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset.yaml of any version as today's: ``VQAWebdataset`` named a class, now it is ``VQASample``.

    Args:
        found: its content.
        origin: whose it is.
        settings: ``sample_type`` and ``field_map`` of the config go before what stands there.

    Raises:
        DataError: it is of another class, or has no field map of text.
    """
    name = settings["sample_type"] or (VQA if settings["field_map"] else _class(found))
    old = OLD_CLASS.fullmatch(name)
    kind = f"{old[1]}Sample" if old and name != CRUDE else name
    if kind == CRUDE:
        return description(kind, {})
    theirs = found.get("field_map")
    fields = {**(theirs if isinstance(theirs, dict) else {}), **settings["field_map"]}
    fields = {field: path for field, path in fields.items() if path is not None}
    if kind != VQA or not fields:
        raise DataError(
            f"{origin / DATASET} describes a {name}{'' if fields else ' without field_map'}; plait reads "
            f"{VQA} by a field_map, and {CRUDE}",
            hint="give the dataset a sample_type and a field_map in its energon keys, or use kind tars",
        )
    _check_fields(fields, origin)
    return description(kind, fields)


def _class(found: Mapping[str, Any]) -> str:
    named = found.get("sample_type") or found
    return str(named.get("__class__") if isinstance(named, dict) else named)


def _check_fields(fields: Mapping[Any, Any], origin: Path) -> None:
    odd = [field for field, path in fields.items() if field not in POSSIBLE or not isinstance(path, str)]
    lacking = [field for field in NEEDED if field not in fields]
    if odd or lacking:
        wrong = f"has {odd[0]}: {fields[odd[0]]!r}" if odd else f"has no {lacking[0]}"
        raise DataError(
            f"the field_map of {origin / DATASET} {wrong}; it names a part of the tar, as jpg,png or "
            f"json[0][value], for each of image, context and answers",
            hint="field_map of the dataset's energon keys goes before it, field by field",
        )


# The split


@dataclass(frozen=True)
class Split:
    """Which shards are whose.

    Attributes:
        parts: shards of each part, without those that are left out.
        left_out: shards, and single samples by ``SHARD/KEY``.
    """

    parts: Mapping[str, list[str]]
    left_out: frozenset[str]


def read_split(path: Path) -> Split:
    """A split.yaml.

    Raises:
        DataError: it is missing, or is none.
    """
    found = read_yaml(path)
    named = found.get("split_parts") or {}
    if not isinstance(named, dict):
        raise DataError(f"{path}: split_parts is {named!r}, not a list of shards for each part", hint=HINT)
    unknown = [str(part) for part, names in named.items() if part not in PARTS and names]
    if unknown:
        raise DataError(
            f"{path} has the part {', '.join(unknown)}, which nothing reads; parts are {', '.join(PARTS)}",
            hint=HINT,
        )
    left_out = frozenset(_expanded(path, found.get("exclude")))
    parts = {part: _expanded(path, named.get(part)) for part in PARTS}
    kept = {part: [name for name in names if name not in left_out] for part, names in parts.items()}
    return Split(kept, left_out)


def _expanded(path: Path, names: Any) -> list[str]:
    """The shards that braces stand for: ``{000000..000003}.tar``."""
    from braceexpand import braceexpand

    if not isinstance(names or [], list) or not all(isinstance(name, str) for name in names or []):
        raise DataError(f"{path} has {names!r} where a list of shards is expected", hint=HINT)
    try:
        return [one for name in names or [] for one in braceexpand(name)]
    except ValueError as error:
        raise DataError(f"{path} names shards by braces that are none: {error}", hint=HINT) from error


def check_split(split: Split, shards: Iterable[str], where: Path | str) -> None:
    """Refuse a split that leaves a shard out without a word, gives it twice, or names one that is not there.

    Args:
        split: what is to be checked.
        shards: all shards that are to be read.
        where: whose it is.

    Raises:
        DataError: it names the shards.
    """
    dealt = Counter(name for names in split.parts.values() for name in names)
    there = set(shards)
    faults = {
        "names {}, which is not there": dealt.keys() - there,
        "leaves {} out of every part": there - dealt.keys(),
        "gives {} twice": {name for name, times in dealt.items() if times > 1},
    }
    for sentence, names in faults.items():
        if names:
            some = ", ".join(sorted(names)[:SHOWN]) + (
                f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
            )
            raise DataError(f"{where} {sentence.format(some)}", hint=HINT)


HINT = "`split_parts` of the dataset's energon keys gives each shard to one part, `exclude` leaves shards out"


# The counts


def shard_counts(origin: Path) -> dict[str, int]:
    """Samples of each shard as the one who prepared a dataset counted them; none where none are there.

    Raises:
        DataError: they are no counts.
    """
    path = next((origin / name for name in (INFO, OLD_INFO) if (origin / name).is_file()), None)
    if path is None:
        return {}
    found = files.read_json(path) if path.suffix == ".json" else read_yaml(path)
    counts = found.get("shard_counts") if isinstance(found, dict) else None
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        raise DataError(f"{path} has no shard_counts", hint="`energon prepare` writes it; or remove it")
    return counts


def check_counts(counted: Mapping[str, int], there: Mapping[str, int], where: Path) -> None:
    """Compare shards with what was counted when they were prepared.

    Args:
        counted: samples of each shard then.
        there: samples of each shard now.
        where: whose they are.

    Raises:
        DataError: it names the first shard that differs.
    """
    for name, count in counted.items():
        if there.get(name, count) != count or not (where / name).is_file():
            found = f"holds {there[name]} samples" if name in there else "is not there"
            raise DataError(
                f"{where}: {name} {found}, and {count} were counted when it was prepared",
                hint="write or download the shard again, or leave it out by `exclude` of the energon keys",
            )
