"""A model folder, such as a git clone, that a user has put where plait would write one."""

import tempfile
from pathlib import Path

from plait import files
from plait.config.model import FolderModel
from plait.errors import CheckpointError
from plait.foreign import Found
from plait.layout import FAST, TENSORS, HfModel
from plait.models.link import link


def model(target: HfModel, kind: str) -> Found:
    """Check a model as one of kind folder is checked when it is linked.

    What training and export need and the folder lacks comes beside. A tokenizer.json in an older form stays
    as it is; the digest of today's form, which packed data have, goes into the facts.

    Raises:
        CheckpointError: it does not hold what its config promises, or has digests of other tensors; or the
            config makes such a model itself.
        DataError: it is a clone without its large files, or its tokenizer cannot be read.
    """
    folder = Path(str(target))
    if kind not in {"folder", "hub"}:
        raise CheckpointError(
            f"raw_hf.{target.model} is of kind {kind!r} in config/, which plait makes itself",
            hint=f"write raw_hf: {{{target.model}: {{kind: folder, path: {target}}}}} into config/",
        )
    with tempfile.TemporaryDirectory() as temporary:
        linked = Path(temporary)
        facts = link(linked, FolderModel(kind="folder", path=str(folder)))
        written = {path.name: path for path in linked.iterdir() if not path.is_symlink()}
        names = [
            path.name for path in linked.iterdir() if path.is_symlink() or (folder / path.name).is_file()
        ]
        beside = {name: path.read_bytes() for name, path in written.items() if name not in names}
        _refuse_others(folder / TENSORS, written[TENSORS])
        if FAST in written:
            facts[FAST] = files.digest(written[FAST])
    return Found("hf_model", names, facts, beside)


def _refuse_others(standing: Path, own: Path) -> None:
    """Refuse a folder with digests of tensors that are not its own: nothing of a user's is replaced.

    Raises:
        CheckpointError: it has such.
    """
    if standing.is_file() and standing.read_bytes() != own.read_bytes():
        raise CheckpointError(
            f"{standing} is not of the weights beside it, and plait keeps the digests of tensors there",
            hint="move it away",
        )
