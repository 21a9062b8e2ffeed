"""Models of the Hugging Face hub: the fetched files of one commit, linked."""

import logging
from pathlib import Path
from typing import Any

from plait import files
from plait.config.hub import HubModel
from plait.config.lock import Lock
from plait.errors import DataError
from plait.fetch.lfs import refuse_pointers
from plait.layout import HubFile
from plait.models.link import as_safetensors, check_and_complete
from plait.models.weights import BIN_INDEX, FolderTensors, write_down

log = logging.getLogger(__name__)


def hub(folder: Path, settings: HubModel) -> dict[str, Any]:
    """Link the files of a model into an empty folder; the facts of its manifest, with the commit it is of.

    What training and export need and the repository lacks is written beside the links: safetensors too, where
    it has its weights in PyTorch's older format, whose links then go.

    Raises:
        DataError: the revision is not locked, or a file of it is not fetched.
        ConfigError: it has no weights that plait reads.
        CheckpointError: what it has is not a model that plait knows.
    """
    lock = Lock()
    found = lock.files(settings, "raw_hf")
    if found is None:
        raise DataError(f"{settings.tree.key} is not locked", hint="plait lock")
    for file in found:
        files.link(as_fetched(file), folder / file.file)
    refuse_pointers(folder / file.file for file in found)
    written = as_safetensors(folder, folder)
    if written:
        for path in [*folder.glob("pytorch_model*.bin"), folder / BIN_INDEX]:
            files.remove(path)
    tensors = FolderTensors(folder)
    written += check_and_complete(folder, folder, tensors)
    commit = lock.commit(settings)
    log.info(
        "%s at %s: %d files, %d tensors%s", settings.repo, commit, len(found), len(tensors), tensors.note
    )
    if written:
        log.info("written: %s", ", ".join(written))
    return {**write_down(tensors), "commit": commit}


def as_fetched(file: HubFile) -> Path:
    """The place of a file from afar, if it is as it was fetched.

    Raises:
        DataError: it is not fetched, or was changed since.
    """
    checked = files.read_json(file.manifest)
    if not Path(str(file)).is_file() or Path(str(file)).stat().st_size != checked["bytes"]:
        raise DataError(
            f"{file} is not the file that was fetched", hint=f"remove it, then plait fetch {file}"
        )
    return Path(str(file))
