"""Which inputs of a run stand, which are to be made or fetched, and which cannot be had."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from plait import files, layout
from plait.config import Plan
from plait.errors import PlaitError

State = Literal["stands", "is to be made", "is to be fetched", "cannot be had"]
ORDER: tuple[State, ...] = ("stands", "is to be made", "is to be fetched", "cannot be had")
AFAR = (layout.HubTree, layout.HubFile)


@dataclass(frozen=True)
class Input:
    """An artifact that a run needs, how it stands with it, and why it cannot be had."""

    artifact: layout.Artifact
    state: State
    why: str = ""


def whole(artifact: layout.Artifact) -> bool:
    """Whether an artifact and its manifest stand, with all files of the sizes that it lists; none is read."""
    manifest = Path(artifact.manifest)
    if not manifest.is_file() or not Path(str(artifact)).exists():
        return False
    if manifest.name != layout.MANIFEST:
        return True
    listed = files.read_manifest(manifest.parent)["files"]
    paths = {manifest.parent / name: entry["bytes"] for name, entry in listed.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def stands(plan: Plan, artifact: layout.Artifact) -> bool:
    """Whether an artifact is whole and was made with the settings that config/ has now, or adopted.

    Raises:
        PlaitError: it was adopted as something else than config/ has now.
    """
    if not whole(artifact):
        return False
    if isinstance(artifact, AFAR) or plan.adopted(artifact):
        return True
    made = files.read_json(artifact.manifest).get("settings")
    return made is None or files.canonical(made) == plan.settings_text(artifact)


def inputs_of(plan: Plan, run: str) -> list[Input]:
    """Every artifact that a run's first checkpoint needs, each once; what is below one that stands is not."""
    found: dict[layout.Artifact, Input] = {}
    first = layout.Iteration(run=run, iteration=plan.first(run) + 1)
    waiting = [*_parts(plan, layout.Run(run=run)), plan.start(first, plan.schedule_as_known(run))]
    while waiting:
        artifact = waiting.pop()
        if artifact in found:
            continue
        found[artifact] = one = _look(plan, artifact)
        if one.state == "is to be made":
            waiting += _parts(plan, artifact)
    return sorted(found.values(), key=lambda one: (ORDER.index(one.state), str(one.artifact)))


def _look(plan: Plan, artifact: layout.Artifact) -> Input:
    try:
        if stands(plan, artifact):
            return Input(artifact, "stands")
        if isinstance(artifact, AFAR):
            return Input(artifact, "is to be fetched")
        if isinstance(artifact, layout.Raw) and plan.to_supply(artifact):
            return Input(artifact, "cannot be had", f"you must supply {plan.to_supply(artifact)}")
        _parts(plan, artifact)
    except PlaitError as error:
        return Input(artifact, "cannot be had", " ".join(str(error).split()))
    return Input(artifact, "is to be made")


def _parts(plan: Plan, artifact: layout.Artifact) -> list[layout.Artifact]:
    """What an artifact is made from; an iteration also from the one before it."""
    parts: list[Any] = [one for several in plan.inputs(artifact).values() for one in several]
    if isinstance(artifact, layout.Iteration):
        parts.append(plan.start(artifact, plan.schedule_as_known(artifact.run)))
    return parts


def summary(found: list[Input]) -> Iterator[tuple[str, str]]:
    """How many of each kind are in which state; what cannot be had is named."""
    rows = [(one.state, type(one.artifact).__name__.lower()) for one in found]
    for state, group in groupby(rows, key=lambda row: row[0]):
        kinds = [kind for _, kind in group]
        yield state, ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    for one in found:
        if one.state == "cannot be had":
            yield "", f"{one.artifact}: {one.why}" if str(one.artifact) not in one.why else one.why
