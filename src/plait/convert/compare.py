"""Two models tensor by tensor, and a model with what it was when it was made."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plait import files
from plait.convert import layouts
from plait.convert.stream import Model, View
from plait.errors import CheckpointError, DataError
from plait.layout import MANIFEST, TENSORS, Chat, HubFile
from plait.models.leaves import Leaf, read_leaves, root

HF_MODEL = "hf_model"
DAMAGED = "it is damaged: ask for it again"
PIECE = 1 << 22
"""Elements that are compared at a time."""


class Difference(NamedTuple):
    """A tensor that two models do not have alike, and how it differs."""

    name: str
    how: str


def check(path: Path) -> tuple[str, int]:
    """Compare a model with its manifest: each tensor, then each file.

    Returns:
        The Merkle root of its model, and how many tensors it has.

    Raises:
        CheckpointError: a tensor is not what it was; the first is named.
        DataError: a file is not what it was, or the manifest is missing.
    """
    manifest = files.read_manifest(path)
    if not (path / TENSORS).is_file():
        raise CheckpointError(
            f"{path} has no {TENSORS}: it is not a model, or was made before digests of tensors were kept",
            hint=f"ask for it again; its files can be compared with {MANIFEST} by `plait adopt`",
        )
    known = read_leaves(path)
    if root(known) != manifest["facts"]["merkle"]:
        raise CheckpointError(f"{path / TENSORS} does not have the Merkle root that {MANIFEST} records")
    model = layouts.of_folder(path) if manifest["kind"] == HF_MODEL else layouts.opened(path)[1]
    for one in differences(known, model.stream()):
        raise CheckpointError(f"{path}: {one.name} {one.how}", hint=DAMAGED)
    files.check_manifest(path)
    return root(known), len(known)


def checked(path: Path) -> str:
    """Compare any artifact, or a file of one, with what was recorded of it; what was compared, in words.

    A Hugging Face folder that was adopted before digests of tensors were kept has none beside it: of what is
    damaged there the file is named.

    Raises:
        CheckpointError: a tensor, or a model, is not what it was.
        DataError: a file is not what it was, or nothing was recorded of it.
    """
    ledger = _ledger(path)
    if ledger or path.is_file():
        record, entry = _recorded(path, ledger)
        files.check_file(path, entry, record=record.name)
        return f"{entry['bytes']} bytes as they were made; sha256 {entry['sha256']}"
    manifest = files.read_manifest(path)
    if "merkle" not in manifest["facts"]:
        return f"{len(files.check_manifest(path)['files'])} files as they were made"
    if manifest["kind"] != HF_MODEL or (path / TENSORS).is_file():
        merkle, tensors = check(path)
        return f"{tensors} tensors as they were made; merkle {merkle}"
    files.check_manifest(path)
    found = layouts.of_folder(path).stream()
    now, then = root(found), manifest["facts"]["merkle"]
    if now != then:
        raise CheckpointError(f"{path} has Merkle root {now[:12]}, not {then[:12]}", hint=DAMAGED)
    return f"{len(found)} tensors as they were made; merkle {now}"


def _ledger(path: Path) -> Path | None:
    """What records an artifact that is one file, by its path in any project; None for all else."""
    parts = path.absolute().parts
    for start in (number for number, part in enumerate(parts) if part == "data"):
        for kind in (Chat, HubFile):
            found = kind.read("/".join(parts[start:]))
            if found:
                return Path(*parts[:start], found.manifest)
    return None


def _recorded(path: Path, ledger: Path | None) -> tuple[Path, dict[str, Any]]:
    """Where the size and digest of a file are recorded, and what they are.

    Raises:
        DataError: they are not.
    """
    if ledger and ledger.is_file():
        return ledger, files.read_object(ledger)
    place = path.absolute()
    for folder in place.parents:
        listed = files.read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
        entry = listed.get(place.relative_to(folder).as_posix())
        if entry:
            return folder / MANIFEST, entry
    raise DataError(
        f"{path} cannot be compared with what it was: "
        f"{f'there is no {ledger}' if ledger else f'no {MANIFEST} lists its digest'}",
        hint="give an artifact that is a folder, a shard of chat records with its ledger, or a fetched file",
    )


def differences(one: Mapping[str, Leaf], other: Mapping[str, Leaf]) -> Iterator[Difference]:
    """The tensors that two models do not have alike, in the first one's order."""
    for name, leaf in one.items():
        if name not in other:
            yield Difference(name, "is missing in the second")
            continue
        for what, mine, theirs in zip(Leaf._fields, leaf, other[name], strict=True):
            if mine != theirs:
                yield Difference(name, f"has {what} {_short(theirs)}, not {_short(mine)}")
                break
    yield from (Difference(name, "is missing in the first") for name in other if name not in one)


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value


def diff(one: Model, other: Model) -> Iterator[Difference]:
    """The tensors that differ, with how far where their shapes and types are alike."""
    left, right = one.stream(), other.stream()
    for found in differences(left, right):
        name = found.name
        if name in left and name in right and left[name][:2] == right[name][:2]:
            yield Difference(name, _how_far(one, other, name))
        else:
            yield found


def _how_far(one: Model, other: Model, name: str) -> str:
    mine, theirs = (View(model)[name] for model in (one, other))
    count, most, where = 0, -1.0, 0
    pieces = zip(mine.flatten().split(PIECE), theirs.flatten().split(PIECE), strict=True)
    for number, (left, right) in enumerate(pieces):
        apart = (left.double() - right.double()).abs().nan_to_num(float("inf"))
        count += int((apart != 0).sum())
        if float(apart.max()) > most:
            most, where = float(apart.max()), number * PIECE + int(apart.argmax())
    place: list[int] = []
    at = where
    for size in reversed(mine.shape):
        at, rest = divmod(at, size)
        place.insert(0, rest)
    values = (float(tensor.flatten()[where]) for tensor in (mine, theirs))
    return "differs in {} of {} elements, most by {:.3g} at {}: {:.6g} and {:.6g}".format(
        count, mine.numel(), most, place, *values
    )
