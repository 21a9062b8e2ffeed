"""A model in any layout that is read: whatever its files are, they hold a Hugging Face model."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from plait.convert import carried, checkpoint, forms, torch_dist
from plait.convert.engine import State, to_mcore
from plait.convert.forms import coverage
from plait.convert.stream import Model, Placed, View
from plait.errors import CheckpointError
from plait.layout import HF_CONFIG, TRACKER
from plait.models.leaves import write_leaves
from plait.models.specs import Spec
from plait.models.stored import Stored
from plait.models.weights import FolderTensors, check_shapes, lay_out
from plait.parallel.grid import Grid

CONFIG = "config.json"


def of_hf(folder: Path | str, spec: Spec, only: Collection[str] | None = None) -> Model:
    """A Hugging Face folder.

    Args:
        folder: the folder.
        spec: the model.
        only: some of its tensors; None is all.

    Raises:
        CheckpointError: a file is not whole, or it does not hold what its config promises.
    """
    stored = FolderTensors(folder).placed
    check_shapes({name: one.shape for name, one in stored.items()}, spec.shapes, str(folder))
    return _as_stored({name: stored[name] for name in spec.shapes if only is None or name in only})


def of_folder(folder: Path | str) -> Model:
    """All that a Hugging Face folder has, whatever its config says: a vision tower is no language model.

    Raises:
        CheckpointError: a file is not whole.
    """
    return _as_stored(FolderTensors(folder).placed)


def _as_stored(stored: Mapping[str, Stored]) -> Model:
    shapes = {name: one.shape for name, one in stored.items()}
    form = forms.identity(shapes)
    return Model([Placed(name, stored[name], held) for name, held in form.items()], shapes)


def lay_out_hf(folder: Path, spec: Spec, dtypes: Mapping[str, str]) -> list[Placed]:
    """Make safetensors files with room for a model; where each tensor stands."""
    form = forms.identity(spec.shapes)
    stored = lay_out(folder, dtypes, spec.shapes)
    return [Placed(name, stored[name], held) for name, held in form.items()]


def released(folder: Path | str, spec: Spec, grid: Grid | None = None) -> Model:
    """A Megatron model in the classic layout.

    Args:
        folder: the checkpoint.
        spec: the model.
        grid: its grid; None is what the checkpoint says itself.

    Raises:
        CheckpointError: as :func:`plait.convert.checkpoint.sources`; or an element is missing.
    """
    placed = checkpoint.sources(folder, spec, grid) + carried.sources(folder, spec)
    return Model(placed, spec.shapes)


def trained(folder: Path | str, spec: Spec) -> Model:
    """A training checkpoint, torch_dist or classic.

    Raises:
        CheckpointError: as :func:`plait.convert.torch_dist.sources`; or an element is missing or there twice.
    """
    folder = Path(folder)
    is_classic = checkpoint.saved(folder) == folder and not (folder / torch_dist.METADATA).is_file()
    placed = checkpoint.sources(folder, spec) if is_classic else torch_dist.sources(folder, spec)
    return Model(placed + carried.sources(folder, spec), spec.shapes)


def whole(model: Model, spec: Spec) -> State:
    """Megatron's whole tensors of a model, each made when it is asked for."""
    return to_mcore(View(model), spec)


def facts_of_iteration(folder: Path | str, spec: Spec, grid: Grid) -> dict[str, Any]:
    """Merkle root and coverage of a training checkpoint, from what is on disk.

    Raises:
        CheckpointError: an element of the model is missing, or stored twice.
    """
    leaves = trained(folder, spec).stream()
    return {
        "merkle": write_leaves(Path(folder), leaves),
        "coverage": coverage(spec, grid),
        "grid": grid.facts,
    }


def opened(path: Path, *, step: int | None = None, hf: Path | None = None) -> tuple[Spec, Model]:
    """A model, whatever layout it is in; see :func:`found`."""
    spec, model, _ = found(path, step=step, hf=hf)
    return spec, model


def found(path: Path, *, step: int | None = None, hf: Path | None = None) -> tuple[Spec, Model, Path]:
    """A model, whatever layout it is in, and the folder of its config.

    Args:
        path: a Hugging Face folder, a Megatron model in the classic layout, a training checkpoint, or a
            folder of such checkpoints.
        step: the iteration, where the folder has several.
        hf: the Hugging Face folder that says what model it is, where the checkpoint has none of its config.

    Raises:
        CheckpointError: it is none of these, or is not whole; or ``hf`` is of another model.
    """
    place = path / checkpoint.ITERATION.format(step) if step is not None else path
    if not place.is_dir():
        raise CheckpointError(
            f"{place} is no folder", hint="give a model's folder, and --step for an iteration"
        )
    # LLaVA-JP and Pai-Megatron-Patch lay a config.json beside their files, Pai that of its language model.
    is_megatron = (place / TRACKER).is_file() and checkpoint.saved(place).is_dir()
    known = (*([] if is_megatron else [place / CONFIG]), place / HF_CONFIG, path / HF_CONFIG)
    own = next((config for config in known if config.is_file()), None)
    config = hf / CONFIG if hf else own or (place / CONFIG if is_megatron else None)
    if config is None or not config.is_file():
        raise CheckpointError(
            f"{config.parent if config else place} has no {CONFIG}",
            hint="say which model it is by --hf FOLDER, its Hugging Face folder",
        )
    if own and config.read_bytes() != own.read_bytes():
        raise CheckpointError(f"{own} is not {config}", hint="leave --hf out, or give the model's own folder")
    spec = Spec.of(config.parent, config.name)
    if own == place / CONFIG:
        return spec, of_hf(place, spec), config.parent
    is_iteration = (place / torch_dist.METADATA).is_file() or checkpoint.saved(place) == place
    return spec, trained(place, spec) if is_iteration else released(place, spec), config.parent
