"""A model folder that is already on this machine: linked, nothing copied."""

import logging
from pathlib import Path
from typing import Any

from plait.config.model import FolderModel
from plait.errors import CheckpointError
from plait.layout import MANIFEST
from plait.models.specs import Spec
from plait.models.weights import FolderTensors, check_shapes, merkle

OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""The same weights again, as other programs want them."""

log = logging.getLogger(__name__)


def link(folder: Path, settings: FolderModel) -> dict[str, Any]:
    """Link every file of a local folder but hidden ones; the facts of the manifest.

    Raises:
        CheckpointError: there is no such folder, or it does not hold what its config promises.
    """
    source = Path(settings.path).expanduser().resolve()
    if not source.is_dir():
        raise CheckpointError(
            f"{settings.path} is not a folder", hint="raw_hf.*.path names a downloaded model"
        )
    found = [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name != MANIFEST
        and path.suffix not in OTHER_FORMATS
    ]
    for path in found:
        (folder / path.name).symlink_to(path)
    spec, tensors = Spec.of(folder), FolderTensors(folder)
    check_shapes(tensors.shapes, spec.shapes, settings.path)
    log.info("%d files linked, %d tensors%s", len(found), len(tensors), tensors.note)
    return {"merkle": merkle(tensors)}
