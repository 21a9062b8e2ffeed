"""Models of the Hugging Face hub: one commit, the files a model needs, each compared with the hub's digest.

``huggingface_hub`` does not verify what it has downloaded; a body of the right size passes.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from plait import files
from plait.config.model import HubModel
from plait.errors import DataError
from plait.models.link import check_and_complete
from plait.models.weights import FolderTensors, merkle

WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
PICKLES = ("*.bin", "*.pt", "*.pth")

log = logging.getLogger(__name__)


def hub(folder: Path, settings: HubModel) -> dict[str, Any]:
    """Download a model into an empty folder; the facts of its manifest, with the commit it is of.

    Raises:
        DataError: the hub has no such model, gives none, or gives other bytes than it lists.
        CheckpointError: what it has is not a model that plait knows.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _in_a_sentence(settings):
        info = HfApi().model_info(settings.repo, revision=settings.revision, files_metadata=True)
        listed = {one.rfilename: one for one in info.siblings or []}
        names = [name for name in listed if "/" not in name and any(fnmatch(name, w) for w in WANTED)]
        _check_listed(settings, list(listed))
        snapshot_download(settings.repo, revision=info.sha, allow_patterns=names, local_dir=folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for name in names:
        _check_digest(folder / name, listed[name], settings)
    tensors = FolderTensors(folder)
    written = check_and_complete(folder, folder, tensors)
    log.info(
        "%s at %s: %d files, %d tensors%s", settings.repo, info.sha, len(names), len(tensors), tensors.note
    )
    if written:
        log.info("written: %s", ", ".join(written))
    return {"merkle": merkle(tensors), "commit": info.sha}


def _check_listed(settings: HubModel, names: list[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES)]
    raise DataError(
        f"{settings.repo} has no safetensors{f', only {pickles[0]} and the like' if pickles else ''}",
        hint="name a revision or a repository with safetensors: pickles of strangers are not opened",
    )


def _check_digest(path: Path, listed: Any, settings: HubModel) -> None:
    """A large file has its sha256 listed, any other that of a git blob."""
    if listed.lfs is not None:
        expected, found = listed.lfs.sha256, files.digest(path)
    else:
        content = path.read_bytes()
        head = b"blob %d\0" % len(content)
        expected, found = listed.blob_id, hashlib.sha1(head + content).hexdigest()  # noqa: S324 - git's own
    if found != expected:
        raise DataError(
            f"{path.name} of {settings.repo} came with digest {found[:12]}, listed is {str(expected)[:12]}",
            hint="ask for the model again; if it stays so, the connection or a mirror changes files",
        )


@contextmanager
def _in_a_sentence(settings: HubModel) -> Iterator[None]:
    """The hub's errors in a sentence of ours."""
    from huggingface_hub import errors

    what = f"{settings.repo} at revision {settings.revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(
            f"{what} is gated", hint="accept its terms on the hub and set HF_TOKEN to a token of yours"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise DataError(
            f"the hub has no {what}", hint="look at raw_hf.*.repo and revision; HF_TOKEN if it is private"
        ) from error
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.HfHubHTTPError,
        OSError,
    ) as error:
        raise DataError(
            f"{what} cannot be fetched: {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="is there a network, and is HF_HUB_OFFLINE unset? a folder on this machine is kind: folder",
        ) from error
