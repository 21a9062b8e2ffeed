"""What goes along with a Megatron model unchanged: its source's configs, and tensors it has no use for.

Megatron's LLaVA does not compute with the layers of a tower above the one that is projected, nor with the
tower's last norm and head. ``carried.safetensors`` holds them beside the checkpoint, so that the Hugging
Face view of every artifact is the whole model, and what is exported is what was given, bit for bit.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plait.convert.engine import to_hf
from plait.convert.tables import carried
from plait.errors import CheckpointError
from plait.layout import CARRIED, HF_CONFIG, HF_PREPROCESSOR
from plait.models.specs import Spec
from plait.models.weights import Tensors, check_shapes

PREPROCESSOR = "preprocessor_config.json"

State = Mapping[str, Tensor]


def take_along(source: Path, folder: Path, hf: State, spec: Spec) -> None:
    """Write what goes along with a model that is converted.

    Args:
        source: its Hugging Face folder.
        folder: the Megatron folder that is made.
        hf: the source's tensors.
        spec: the model.
    """
    shutil.copyfile(source / "config.json", folder / HF_CONFIG)
    if (source / PREPROCESSOR).is_file():
        shutil.copyfile(source / PREPROCESSOR, folder / HF_PREPROCESSOR)
    names = carried(spec)
    if names:
        save_file({name: hf[name].contiguous() for name in names}, folder / CARRIED)


def carry(source: Path, folder: Path) -> None:
    """Copy what goes along from one Megatron folder to one that is made of it."""
    shutil.copyfile(source / HF_CONFIG, folder / HF_CONFIG)
    for name in (HF_PREPROCESSOR, CARRIED):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def hf_view(mcore: State, spec: Spec, folder: Path | str) -> State:
    """The whole Hugging Face model: what Megatron's tensors give, and what is carried in their folder.

    Raises:
        CheckpointError: the carried tensors are missing, or are not those of this model.
    """
    view, expected = Tensors(), carried(spec)
    converted = to_hf(mcore, spec)
    for name in converted:
        view.add((name,), lambda name=name: {name: converted[name]})  # type: ignore[misc]
    if not expected:
        return view
    path = Path(folder) / CARRIED
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: it holds {len(expected)} tensors of the vision tower")
    try:
        stored: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    check_shapes(shapes, expected, str(path))
    for name in expected:
        view.add((name,), lambda name=name: {name: stored.get_tensor(name)})  # type: ignore[misc]
    return view
