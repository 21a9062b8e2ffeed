"""What goes along with a Megatron model unchanged: its source's configs, and tensors it has no use for.

Megatron's LLaVA does not compute with the layers of a tower above the one that is projected, nor with the
tower's last norm and head. ``carried.safetensors`` holds them beside the checkpoint, so that the Hugging
Face view of every artifact is the whole model, and what is exported is what was given, bit for bit.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from plait.convert import forms
from plait.convert.stream import Placed
from plait.convert.tables import carried
from plait.errors import CheckpointError
from plait.layout import CARRIED, HF_CONFIG, HF_PREPROCESSOR, MANIFEST, TENSORS
from plait.models import safe
from plait.models.specs import Spec
from plait.models.weights import check_shapes

PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt", ".onnx"}
OURS = {MANIFEST, TENSORS, CARD}
"""What is made anew with each model."""


def take_along(source: Path, folder: Path) -> None:
    """Copy the configs that go along with a model, of a Hugging Face folder or of a Megatron one."""
    for name, known in (("config.json", HF_CONFIG), (PREPROCESSOR, HF_PREPROCESSOR)):
        found = next((path for path in (source / known, source / name) if path.is_file()), None)
        if found:
            shutil.copyfile(found, folder / known)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what a Hugging Face folder has beside weights: config, tokenizer, processor, code.

    Links are followed. Of a Megatron folder it is the model's configs.
    """
    if not (source / "config.json").is_file():
        for known, name in ((HF_CONFIG, "config.json"), (HF_PREPROCESSOR, PREPROCESSOR)):
            if (source / known).is_file():
                shutil.copyfile(source / known, folder / name)
        return
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in OURS and path.name[0] != ".":
            shutil.copyfile(path, folder / path.name)


def lay_out(folder: Path, spec: Spec, dtypes: Mapping[str, str]) -> list[Placed]:
    """Make a file with room for the tensors that Megatron has no use for; none where there are none."""
    shapes = carried(spec)
    if not shapes:
        return []
    stored = safe.lay_out(folder / CARRIED, [(name, dtypes[name], shape) for name, shape in shapes.items()])
    form = forms.identity(shapes)
    return [Placed(name, stored[name], form[name]) for name in shapes]


def carry(source: Path, folder: Path) -> None:
    """Copy what goes along, tensors too, from one Megatron folder to one that is made of it."""
    take_along(source, folder)
    if (source / CARRIED).is_file():
        shutil.copyfile(source / CARRIED, folder / CARRIED)


def sources(folder: Path | str, spec: Spec) -> list[Placed]:
    """Where the tensors stand that Megatron has no use for.

    Raises:
        CheckpointError: they are missing, or are not those of this model.
    """
    shapes = carried(spec)
    if not shapes:
        return []
    path = Path(folder) / CARRIED
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: it holds {len(shapes)} tensors of the vision tower")
    stored = safe.read(path)
    check_shapes({name: one.shape for name, one in stored.items()}, shapes, str(path))
    form = forms.identity(shapes)
    return [Placed(name, stored[name], form[name]) for name in shapes]
