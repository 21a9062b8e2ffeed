"""What plait did not make and a user wants to have taken as made: how it is recorded.

The stages check, each its own kind of artifact, and say what they found; here the manifest is written. Of
what stands there nothing is moved, changed or removed. What a stage needs and a folder lacks is added.
"""

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait import files
from plait.errors import LayoutError
from plait.layout import MANIFEST, Artifact, Chat

SNAKEMAKE = Path(".snakemake")


@dataclass(frozen=True)
class Found:
    """What a check found.

    Attributes:
        kind: the kind of the manifest.
        names: the files that it lists, relative to the folder.
        facts: what the stage that would have made it would have recorded.
        beside: content of files that plait needs there and the folder lacks, by name.
    """

    kind: str
    names: list[str]
    facts: Mapping[str, Any]
    beside: Mapping[str, bytes] = field(default_factory=dict)


@contextmanager
def linked(artifact: Artifact, elsewhere: str | None) -> Iterator[None]:
    """Links at an artifact's path to every file of what stands elsewhere, taken away again if it is refused.

    Args:
        artifact: what is adopted.
        elsewhere: a folder or a file; None where what is adopted stands at its path. What is adopted
            already stays.

    Raises:
        LayoutError: there is nothing, or something else stands at the artifact's path.
    """
    if elsewhere is None or Path(artifact.manifest).exists():
        yield
        return
    target, source = Path(str(artifact)), Path(elsewhere)
    if os.path.lexists(target):
        raise LayoutError(
            f"{target} stands already, and config/ has {elsewhere} given in its place",
            hint=f"move {target} away, or take it out of `given`",
        )
    found = [path for path in _files(source) if path.name != MANIFEST]
    if not found:
        raise LayoutError(f"there is nothing at {elsewhere}, which config/ has given as {artifact}")
    if isinstance(artifact, Chat) != source.is_file():
        raise LayoutError(f"{elsewhere} is no {'file' if source.is_dir() else 'folder'}, as {artifact} is")
    with files.appears_whole(target, folder=source.is_dir()) as part:
        for path in found:
            link = part / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    try:
        yield
    finally:
        if not Path(artifact.manifest).exists():
            files.remove(target)


def _files(source: Path) -> list[Path]:
    """A file itself, or every file of a folder but those of git."""
    if source.is_file():
        return [source]
    found = (path for path in source.rglob("*") if path.is_file())
    return sorted(path for path in found if ".git" not in path.relative_to(source).parts)


def record(artifact: Artifact, found: Found, settings: Mapping[str, Any]) -> None:
    """Write the manifest of an artifact that was checked, and what it lacks beside it."""
    folder = Path(str(artifact))
    for name, content in found.beside.items():
        with files.appears_whole(folder / name) as part:
            part.write_bytes(content)
    manifest = {
        "schema": files.SCHEMA,
        "kind": found.kind,
        "settings": settings,
        "inputs": {},
        "adopted": True,
    }
    if isinstance(artifact, Chat):
        with files.appears_whole(artifact.rejects) as part:
            part.write_bytes(b"")
        manifest |= {**found.facts, "bytes": folder.stat().st_size, "sha256": files.digest(folder)}
    else:
        manifest |= {
            "files": files.listed(folder, sorted({*found.names, *found.beside})),
            "facts": found.facts,
        }
    files.write_json(artifact.manifest, manifest)
    forget(artifact)


def forget(artifact: Artifact) -> None:
    """Remove what Snakemake recorded of another artifact that it once made at this path.

    By such a record it would see changed settings, and remove what stands there to make it anew.
    """
    others = [artifact.rejects] if isinstance(artifact, Chat) else []
    for path in (str(artifact), artifact.manifest, *others):
        name = base64.urlsafe_b64encode(path.encode()).decode()
        for kind in ("metadata", "incomplete"):
            (SNAKEMAKE / kind / name).unlink(missing_ok=True)
