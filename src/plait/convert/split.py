"""A conversion in several jobs, at any time and on any machines that see its folders.

::

    .NAME.parts/2-of-3.json    the tensors that part 2 wrote, by type, shape and digest; it comes last
    .NAME.parts/KEY/           all files of the target, with room for each tensor

Each part writes tensors of its own into the same files, whose place follows from the plan: no byte is
written by two. A part that was killed is run again and writes the same bytes to the same place. One more job
checks that the parts wrote each tensor once and have read what the source's manifest says, and moves the
files into place: until then nothing looks like the target. KEY stands for the source and the settings, so
whoever still writes what was asked for before writes elsewhere.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from plait import files
from plait.convert.folders import Conversion
from plait.convert.stream import Model, Placed
from plait.errors import CheckpointError, ConfigError
from plait.layout import Artifact
from plait.models.leaves import Leaf, from_json, to_json
from plait.models.stored import SIZES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What becomes of a model.

    Attributes:
        conversion: the model, and what it becomes.
        target: where.
        kind: of the target's manifest.
        settings: the same.
    """

    conversion: Conversion
    target: Artifact
    kind: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Stands for source and settings."""
        source = files.digest_of_input(self.conversion.source)
        text = files.canonical({"source": source, "settings": self.settings})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def whole(self, of: int = 0) -> None:
        """Write the target and its manifest, or join it of so many parts where there are any.

        Raises:
            CheckpointError: the source is not what its manifest says; or a part is missing, it is named.
            ConfigError: there cannot be so many parts.
        """
        if of < 0:
            raise ConfigError(f"{of} parts cannot be joined", hint="say how many were made; 0 is none")
        with files.appears_whole(str(self.target), folder=True) as folder:
            facts = self._joined(folder, of) if of else self.conversion.write(folder)
            source = self.conversion.source
            files.write_manifest(folder, kind=self.kind, settings=self.settings, inputs=[source], facts=facts)
        files.remove(Path(self.target.parts))

    def part(self, number: int, of: int) -> None:
        """Write a part of the target's tensors, beside it; :meth:`whole` joins them.

        Raises:
            CheckpointError: a file is cut off; or the target's files do not take each element once.
            ConfigError: there is no such part.
        """
        if not 1 <= number <= of:
            raise ConfigError(f"there is no part {number} of {of}", hint=f"parts are 1/{of} to {of}/{of}")
        files.refuse_foreign(self.target)
        model, key = self.conversion.model, self.key
        with files.appears_whole(self.target.part(number, of)) as said:
            said.touch()  # says who is at work
            place = Path(self.target.parts, key)
            leaves = model.stream(self._laid_out(place), only=share(model, number, of))
            files.sync(place)
            said.write_text(json.dumps({"key": key, "tensors": to_json(leaves)}), encoding="utf-8")
        log.info("part %d of %d: %d of %d tensors", number, of, len(leaves), len(model.shapes))

    def _laid_out(self, place: Path) -> list[Placed]:
        """The target's files, made by the first part that comes; where each tensor goes."""
        with files.appears_once(place) as folder:
            placed = self.conversion.lay_out(folder)
        return [
            replace(one, stored=replace(one.stored, path=place / one.stored.path.relative_to(folder)))
            for one in placed
        ]

    def _joined(self, folder: Path, of: int) -> dict[str, Any]:
        """Link what parts wrote into a folder; the facts of its manifest."""
        place = Path(self.target.parts, self.key)
        leaves = self._gathered(place, of)
        for path in (path for path in place.rglob("*") if path.is_file()):
            link = folder / path.relative_to(place)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
        try:
            facts = self.conversion.finish(folder, leaves)
        except CheckpointError:
            files.remove(place.parent)  # what was read of a source that is not whole is of no use
            raise
        log.info("%d parts -> %d tensors%s", of, len(leaves), self.conversion.note)
        return facts

    def _gathered(self, place: Path, of: int) -> dict[str, Leaf]:
        """The tensors that parts wrote, in the model's order.

        Raises:
            CheckpointError: a part is missing, or of another source; or together they are not the model.
        """
        found: dict[str, Leaf] = {}
        times, missing = Counter[str](), []
        for number in range(1, of + 1):
            path = Path(self.target.part(number, of))
            said = files.read_object(path) if path.is_file() and place.is_dir() else {}
            if said.get("key") != place.name:
                path.unlink(missing_ok=True)
                missing.append(f"{number}/{of}")
                continue
            leaves = from_json(said["tensors"])
            times.update(list(leaves))
            found |= leaves
        if missing:
            raise CheckpointError(
                f"{self.target} lacks part {', '.join(missing)}, or it was made of another source or with "
                "other settings",
                hint=f"make it with --part {missing[0]}, then join them again",
            )
        shapes = self.conversion.model.shapes
        wrong = next((name for name in times.keys() | shapes if times[name] != (name in shapes)), None)
        if wrong:
            files.remove(place.parent)
            raise CheckpointError(
                f"{self.target}: its {of} parts wrote {wrong} {times[wrong]} times", hint="make them again"
            )
        return {name: found[name] for name in shapes}


def share(model: Model, number: int, of: int) -> list[str]:
    """The tensors of a part: neighbours, so that files are read from front to back; about as many bytes each.

    Args:
        model: the model.
        number: the part, from 1.
        of: how many there are.
    """
    sizes = [math.prod(shape) * SIZES[model.dtypes[name]] for name, shape in model.shapes.items()]
    ends = list(accumulate(sizes))
    twice = max(1, 2 * ends[-1])
    parts = (min((2 * end - size) * of // twice, of - 1) for end, size in zip(ends, sizes, strict=True))
    return [name for name, part in zip(model.shapes, parts, strict=True) if part == number - 1]
