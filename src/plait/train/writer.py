"""What a rank writes of a checkpoint, with equal bytes for equal states.

Each rank writes its weights in one file and its optimizer's state in another, so that this can be removed
without those; rank 0 then makes the folder whole. Torch's own strategy would record a random id and the
folder's absolute path; an artifact holds nothing but its content. Nothing here needs Megatron Core or a
process group, so that a process beside training can do it.
"""

import hashlib
import os
import pickle
import queue
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from plait import files
from plait.convert.carried import carry
from plait.convert.layouts import facts_of_iteration
from plait.layout import OPTIMIZER, TRAINED_WITH
from plait.models.specs import Spec
from plait.parallel.grid import Grid

WRITTEN = ".written_{rank}"
"""What says, while a folder is written, that a rank's share of it is there."""
LOOK = 0.02


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says of where it comes from.

    Attributes:
        start: the Megatron folder that training started from: its config files and carried tensors go along.
        spec: the model's shape.
        grid: the grid it is trained on.
        settings: the run's settings; they go into the manifest.
        inputs: what the manifest names as inputs, with their digests; rank 0 knows them.
        tokenizer: sha256 of the model's tokenizer.json, carried to what is trained from here.
        kind: a persistent checkpoint, or a state against a crash, which is neither proven nor tracked.
        facts: what the manifest says besides.
    """

    start: Path
    spec: Spec
    grid: Grid
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    tokenizer: str
    kind: Literal["iteration", "state"] = "iteration"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """What one rank writes of a checkpoint.

    Attributes:
        part: the folder, which becomes the checkpoint.
        rank: this rank.
        ranks: how many there are.
        items: what of the plan is this rank's, and the bytes or the tensor of each.
        metadata: what rank 0 knows of all tensors.
        texts: other files of this rank, by name, as JSON values.
        origin: where the checkpoint comes from; rank 0 writes its manifest. None: the tensors alone.
    """

    part: Path
    rank: int
    ranks: int
    items: list[tuple[WriteItem, Any]]
    metadata: Metadata | None
    texts: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None


class _Digested:
    """A file that is written from its start to its end, and what a manifest lists of it."""

    def __init__(self, file: Any) -> None:
        self._file, self._sha256, self._bytes = file, hashlib.sha256(), 0
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written: int = self._file.write(data)
        except OSError as error:
            self.failed = error
            raise
        self._sha256.update(data)
        self._bytes += written
        return written

    @property
    def entry(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Digests(FileSystem):
    """Torch's files, and what a manifest lists of each."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            stream = _Digested(file)
            try:
                yield stream
            except RuntimeError as error:
                raise stream.failed or error from error  # torch's archive says less
        self.entries[Path(path).name] = stream.entry


class Writer(FileSystemWriter):
    """Torch's writer, two files a rank, without the id and the path."""

    def __init__(self, part: Path) -> None:
        """Write into a folder; in the plan's order, on a GPU too."""
        super().__init__(part, per_thread_copy_ahead=0)
        self.fs = self._files = _Digests()

    def write_share(self, share: Share) -> tuple[list[Any], dict[str, dict[str, Any]]]:
        """Write a rank's items, weights and all else, and the optimizer's apart.

        Returns:
            Where torch finds each, and the files as a manifest lists them.
        """
        wanted: queue.Queue[Any] = queue.Queue()
        for first in ("", OPTIMIZER):
            items = [item for item, _ in share.items if (f"{OPTIMIZER}." in item.index.fqn) == bool(first)]
            name = f"{first}__{share.rank}_0.distcp"
            if items:
                wanted.put((self.fs.concat_path(self.path, name), name, items))
        values = {id(item): value for item, value in share.items}
        planner: Any = SimpleNamespace(resolve_data=lambda item: values[id(item)])
        results = self._write_data(planner, wanted).value()
        return results, self._files.entries

    def storage_meta(self) -> StorageMeta | None:
        """Say nothing of where and when."""
        return None


def write(share: Share) -> None:
    """Write a rank's share, durable, and what rank 0 must know of it.

    Raises:
        OSError: there is no room.
    """
    written = Writer(share.part).write_share(share)
    for name, value in share.texts.items():
        files.write_json(share.part / name, value)
    done = share.part / WRITTEN.format(rank=share.rank)
    half = done.with_name(f"{done.name}.half")
    half.write_bytes(pickle.dumps(written))
    half.rename(done)


def finish(share: Share) -> None:
    """Make the folder whole once every rank has written its share; rank 0 does.

    Raises:
        CheckpointError: an element of the model is missing, or stored twice.
    """
    written = [_written(share.part / WRITTEN.format(rank=rank)) for rank in range(share.ranks)]
    assert share.metadata is not None
    Writer(share.part).finish(share.metadata, [results for results, _ in written])
    origin = share.origin
    if origin is None:
        return
    carry(origin.start, share.part)
    files.write_json(share.part / TRAINED_WITH, origin.settings)
    proven = origin.kind == "iteration"
    known = (
        facts_of_iteration(share.part, origin.spec, origin.grid) if proven else {"grid": origin.grid.facts}
    )
    files.write_manifest(
        share.part,
        kind=origin.kind,
        settings=origin.settings,
        inputs=origin.inputs,
        facts={**known, **origin.facts, "tokenizer": origin.tokenizer},
        known={name: entry for _, entries in written for name, entry in entries.items()},
    )
    files.sync(share.part)


def _written(path: Path) -> Any:
    """What a rank says of its share, once it is there; the folder is listed, so that NFS looks anew."""
    while path.name not in os.listdir(path.parent):  # noqa: PTH208
        time.sleep(LOOK)
    found = pickle.loads(path.read_bytes())  # noqa: S301 - a rank of this job wrote it just now
    path.unlink()
    return found
