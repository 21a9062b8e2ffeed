"""The stages of conversion, folder to folder; what is read is digested as it passes."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from plait import files
from plait.convert import carried, checkpoint, layouts, optimizer, torch_dist
from plait.convert.compare import differences
from plait.convert.export import set_dtype
from plait.convert.forms import coverage
from plait.convert.moments import Optimizer
from plait.convert.stream import Model, Placed
from plait.convert.tables import Layers, entries
from plait.errors import CheckpointError
from plait.layout import CARRIED, FAST, HF_CONFIG, MANIFEST, TENSORS
from plait.models.leaves import Leaf, read_leaves, root, write_leaves
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid

GIGA = 1e9

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """A model that becomes a Megatron one in the classic layout, folder to folder.

    Attributes:
        source: where it stands.
        spec: the model.
        model: its tensors there.
        tokenizer: the sha256 of its tokenizer.json: training compares it with that of its data, for
            tokenizers of equal size can be told apart by nothing else.
        grid: what it is cut for; None leaves it whole, its vocabulary not padded.
        note: the end of a log line: what of the source is left out.
    """

    source: Path
    spec: Spec
    model: Model
    tokenizer: str
    grid: Grid | None = None
    note: str = ""

    @classmethod
    def of_hf(cls, source: Path) -> Self:
        """A Hugging Face model, to a whole Megatron one.

        Raises:
            CheckpointError: the source does not hold what its config promises.
        """
        spec = Spec.of(source)
        tokenizer = digest_of_tokenizer(source)
        model = layouts.of_hf(source, spec)
        return cls(source, spec, model, tokenizer, note=FolderTensors(source).note)

    @classmethod
    def of_whole(cls, source: Path, grid: Grid) -> Self:
        """A whole Megatron model, to shards of a grid.

        Raises:
            CheckpointError: as :meth:`of_hf`.
        """
        spec = Spec.of(source, HF_CONFIG)
        tokenizer = _carried_digest(source)
        return cls(source, spec, layouts.released(source, spec, Grid()), tokenizer, grid)

    def lay_out(self, folder: Path) -> list[Placed]:
        """Make its files with room for the tensors, and what goes along; where each tensor goes.

        Raises:
            ConfigError: the model cannot be cut for this grid.
        """
        dtypes, is_cut = self.model.dtypes, self.grid is not None
        placed = checkpoint.lay_out(folder, self.spec, self.grid or Grid(), dtypes, padded=is_cut)
        carried.take_along(self.source, folder)
        return placed + carried.lay_out(folder, self.spec, dtypes)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write it; the facts of its manifest.

        Raises:
            CheckpointError: the source is not what its manifest says.
            ConfigError: the model cannot be cut for this grid.
        """
        placed = self.lay_out(folder)
        facts = self.finish(folder, self.model.stream(placed))
        log.info("%d tensors -> %s%s", len(self.model.shapes), self._sizes(placed), self.note)
        return facts

    def _sizes(self, placed: list[Placed]) -> str:
        """What it becomes, in words; tensors that are carried beside do not count."""
        own = [one.stored for one in placed if one.stored.path.name != CARRIED]
        sizes = Counter[Path]()
        for stored in own:
            sizes[stored.path] += stored.nbytes
        most = _bytes(max(sizes.values()))
        return f"{self.grid}, {most} per rank" if self.grid else f"{len(own)} tensors, {most}"

    def finish(self, folder: Path, leaves: Mapping[str, Leaf]) -> dict[str, Any]:
        """Say in a folder what was written to it; the facts of its manifest.

        Raises:
            CheckpointError: that is not what its source's manifest says.
        """
        merkle = _told(self.model, leaves, folder, self.source)
        checkpoint.write_tracker(folder)
        return {
            "merkle": merkle,
            "coverage": coverage(self.spec, self.grid),
            "grid": (self.grid or Grid()).facts,
            "tokenizer": self.tokenizer,
            "dtypes": dtypes(self.spec, self.model.dtypes),
            **files.stamp(self.source),
        }


def convert(source: Path, folder: Path) -> dict[str, Any]:
    """Write a Hugging Face model as a whole Megatron one; see :class:`Conversion`."""
    return Conversion.of_hf(source).write(folder)


def shard(source: Path, folder: Path, grid: Grid) -> dict[str, Any]:
    """Cut a whole Megatron model for a grid; see :class:`Conversion`."""
    return Conversion.of_whole(source, grid).write(folder)


def remake(
    source: Path,
    folder: Path,
    grid: Grid,
    *,
    to: str,
    step: int | None = None,
    hf: Path | None = None,
    ep: int = 1,
    chunks: int = 1,
    layers: Layers = "local",
    optim: bool = False,
) -> dict[str, Any]:
    """Write a model of any layout in another; the facts of its manifest.

    Args:
        source: the model, see :func:`plait.convert.layouts.opened`.
        folder: where it goes.
        grid: the grid of a ``classic`` target.
        to: the target's layout: ``classic``, ``torch_dist`` or ``hf``.
        step: the iteration of the source, where it has several.
        hf: the model's Hugging Face folder: its configs, tokenizer and code.
        ep: expert parallel ranks of a classic target.
        chunks: chunks of each of its stages, where its pipeline is interleaved.
        layers: whose names its tensors have, without an optimizer.
        optim: take the optimizer's state along, see :mod:`plait.convert.optimizer`.

    Raises:
        CheckpointError: the source is not whole, or is none that is read; or has no optimizer that is.
        ConfigError: the model cannot be cut for this grid.
    """
    spec, model, origin = layouts.found(source, step=step, hf=hf)
    place = source / checkpoint.ITERATION.format(step) if step is not None else source
    state = optimizer.found(place, spec) if optim else None
    placed = _laid_out(
        folder, spec, model, state, origin, to=to, grid=grid, ep=ep, chunks=chunks, layers=layers
    )
    facts = {"tensors": len(model.shapes), "grid": grid.facts, "ep": ep, "chunks": chunks, "layers": layers}
    if state:
        state.check(placed)
    facts["merkle"] = _told(model, model.stream(placed[""]), folder, place)
    if state:
        facts["optimizer"] = state.write(placed, read_leaves(folder))
    if to == "classic":
        checkpoint.write_tracker(folder, state.rest.iteration if state else None)
    elif to == "hf":
        set_dtype(folder, model.dtypes[spec.norm])
    return facts


def _laid_out(
    folder: Path,
    spec: Spec,
    model: Model,
    state: Optimizer | None,
    origin: Path,
    *,
    to: str,
    grid: Grid,
    ep: int,
    chunks: int,
    layers: Layers,
) -> dict[str, list[Placed]]:
    """Make the files of a model in a layout; where its weights stand, "", and each kind of state."""
    if to == "hf":
        carried.copy_beside(origin, folder)
        return {"": layouts.lay_out_hf(folder, spec, model.dtypes)}
    carried.take_along(origin, folder)
    beside = carried.lay_out(folder, spec, model.dtypes)
    if to == "classic" and state:
        placed = optimizer.to_classic(folder, spec, grid, model.dtypes, state, ep=ep, chunks=chunks)
    elif to == "classic":
        placed = {
            "": checkpoint.lay_out(folder, spec, grid, model.dtypes, ep=ep, chunks=chunks, layers=layers)
        }
    elif state:
        placed = optimizer.to_torch_dist(folder, spec, model.dtypes, state)
    else:
        placed = torch_dist.lay_out(folder, spec, {"": model.dtypes})
    return {**placed, "": beside + placed[""]}


def _told(model: Model, leaves: Mapping[str, Leaf], folder: Path, source: Path) -> str:
    """Write down in its folder the tensors that a model was read as; their Merkle root.

    Raises:
        CheckpointError: that is not what its source's manifest says; the first tensor that differs is named.
    """
    known = files.read_manifest(source)["facts"].get("merkle") if (source / MANIFEST).is_file() else None
    if known not in (None, root(leaves)):
        kept = read_leaves(source) if (source / TENSORS).is_file() else {}
        one = next(differences(kept, leaves), None) if kept else None
        raise CheckpointError(
            f"{source} is not what it was when it was made: "
            + (
                f"{one.name} {one.how}, in {_where(model, one.name)}"
                if one
                else f"Merkle root {root(leaves)[:12]}, not {known[:12]}"
            ),
            hint="it is damaged: ask for it again",
        )
    return write_leaves(folder, leaves)


def _where(model: Model, name: str) -> str:
    """The files in which a tensor stands."""
    return ", ".join(sorted({str(move.source.stored.path) for move in model.moves(name)}))


def digest_of_tokenizer(source: Path) -> str:
    """What `plait tokenizer` would write of it: a folder that was adopted may have an older form.

    Raises:
        CheckpointError: the folder has no tokenizer.
    """
    if (source / MANIFEST).is_file():
        known = files.read_manifest(source)["facts"].get(FAST)
        if known:
            return str(known)
    path = source / FAST
    if not path.is_file():
        raise CheckpointError(f"{source} has no {FAST}", hint="`plait build` makes or links one")
    return files.digest(path)


def _carried_digest(source: Path) -> str:
    facts = files.read_manifest(source, kind="megatron")["facts"]
    if "tokenizer" not in facts:
        raise CheckpointError(
            f"{source} does not say which tokenizer its model has", hint="`plait convert` makes it anew"
        )
    return str(facts["tokenizer"])


def dtypes(spec: Spec, types: Mapping[str, str]) -> dict[str, list[str]]:
    """The types of a Megatron model's tensors, by part: ``vision_model`` and so on in a LLaVA model."""
    found: dict[str, set[str]] = {}
    for entry in entries(spec):
        found.setdefault(entry.mcore.split(".")[0], set()).update(types[name] for name in entry.hf)
    return {part: sorted(some) for part, some in sorted(found.items())}


def _bytes(size: int) -> str:
    return f"{size / GIGA:.1f} GB" if size >= GIGA else f"{size / 1e6:.1f} MB"
