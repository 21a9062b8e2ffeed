"""A model folder that is already on this machine: linked, nothing copied."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from plait import files
from plait.config.model import FolderModel
from plait.config.paths import local
from plait.errors import CheckpointError
from plait.fetch.lfs import refuse_pointers
from plait.layout import FAST, MANIFEST, TENSORS
from plait.models.common import open_base
from plait.models.specs import ARCHITECTURES, LLAVA, Spec
from plait.models.tower import PREPROCESSOR, is_tower, open_tower, preprocessor_of
from plait.models.towers import Tower
from plait.models.weights import (
    BIN_INDEX,
    FolderTensors,
    check_shapes,
    config_text,
    write_down,
    write_safetensors,
)
from plait.tokens import tokenizer

OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""The same weights again, as other programs want them."""

GENERATION = "generation_config.json"
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
"""Keys of config.json that generation needs, and what they are in Mistral and Llama if not given."""

log = logging.getLogger(__name__)


def link(folder: Path, settings: FolderModel) -> dict[str, Any]:
    """Link every file of a local folder but hidden ones; the facts of the manifest.

    What training and export need and the folder lacks is written beside the links: safetensors too, where
    it has its weights in PyTorch's older format.

    Raises:
        CheckpointError: there is no such folder, it does not hold what its config promises, or it
            has no tokenizer.
        DataError: its tokenizer cannot be read, or its large files are still pointers of git LFS.
    """
    source = local(settings.path).resolve()
    if not source.is_dir():
        raise CheckpointError(
            f"{settings.path} is not a folder", hint="raw_hf.*.path names a downloaded model"
        )
    found = [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (MANIFEST, TENSORS, BIN_INDEX)
        and path.suffix not in OTHER_FORMATS
    ]
    safe = any(path.suffix == ".safetensors" for path in found)
    refuse_pointers(found if safe else [*found, *sorted(source.glob("pytorch_model*.bin"))])
    for path in found:
        (folder / path.name).symlink_to(path)
    written = as_safetensors(source, folder)
    tensors = FolderTensors(folder)
    written += check_and_complete(source, folder, tensors)
    note = f", written: {', '.join(written)}" if written else ""
    linked = sum(path.is_symlink() for path in folder.iterdir())
    log.info("%d files linked, %d tensors%s%s", linked, len(tensors), tensors.note, note)
    return write_down(tensors)


def as_safetensors(source: Path, folder: Path) -> list[str]:
    """Write the weights of a folder that has them as pickles only; the names of the files written.

    Nothing is renamed, cast or left out; one tensor after the other is read.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """
    stored = FolderTensors(source)
    if not stored.pickled:
        return []
    write_safetensors(folder, stored.as_stored)
    return sorted(path.name for path in folder.glob("*.safetensors*"))


def check_and_complete(source: Path, folder: Path, tensors: FolderTensors) -> list[str]:
    """Compare weights and config, and write what is missing; the names of the files written.

    A model whose output layer is its embedding can be linked: LLaVA is built from such a base too.
    """
    config = files.read_object(folder / "config.json")
    if is_tower(config):
        opened = open_tower(folder)
        return _complete_preprocessor(folder, opened.tower)
    if LLAVA in (config.get("architectures") or ()):
        spec = Spec.of(folder)
        check_shapes(tensors.shapes, spec.shapes, str(source))
        assert spec.vision is not None
        written = _complete_preprocessor(folder, spec.vision)
    else:
        open_base(folder, known=[name for name in ARCHITECTURES if name != LLAVA])
        written = []
    return [*written, *_complete_tokenizer(source, folder), *_complete_generation(folder)]


def _complete_preprocessor(folder: Path, tower: Tower) -> list[str]:
    """Write how pictures are prepared where only the processor's config says it."""
    text = preprocessor_of(folder, tower)
    if (folder / PREPROCESSOR).is_file():
        return []
    (folder / PREPROCESSOR).write_text(text, encoding="utf-8")
    return [PREPROCESSOR]


def _complete_tokenizer(source: Path, folder: Path) -> list[str]:
    """Give the folder the tokenizer.json that ``plait tokenizer`` makes of the same one.

    It stays a link where the two are equal; older files are read, and so written, in another form.
    The names of the files written.
    """
    if not any((source / name).is_file() for name in (FAST, tokenizer.SENTENCEPIECE)):
        raise CheckpointError(
            f"{source} has neither {FAST} nor {tokenizer.SENTENCEPIECE}",
            hint="download the model's tokenizer files too: its export needs them",
        )
    if (source / MANIFEST).is_file() and (source / FAST).is_file():
        return []  # plait made it, so it has that form
    written = []
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save(tokenizer.read(source), Path(made))
        for name, replaced in ((FAST, True), (tokenizer.CONFIG, False)):
            new, old = Path(made) / name, folder / name
            if not new.is_file():
                raise CheckpointError(
                    f"{source}: transformers cannot make {name} of its tokenizer",
                    hint=f"put a {name} into the folder",
                )
            if not old.is_file() or (replaced and files.digest(new) != files.digest(old)):
                old.unlink(missing_ok=True)
                shutil.copyfile(new, old)
                written.append(name)
    return written


def _complete_generation(folder: Path) -> list[str]:
    """Write generation_config.json from config.json, as transformers would, where there is none."""
    if (folder / GENERATION).is_file():
        return []
    config = files.read_object(folder / "config.json")
    ids = {key: config.get(key, default) for key, default in IDS.items()}
    known = {key: value for key, value in ids.items() if value is not None}
    text = config_text({"_from_model_config": True, **known})
    (folder / GENERATION).write_text(text, encoding="utf-8")
    return [GENERATION]
