"""Tensors of a Hugging Face folder, read one at a time, written in files of a bounded size.

A :class:`Tensors` is a lazy mapping: asking for a name reads or computes that tensor, iterating
asks for names only. So a conversion holds one row of a model in memory, whatever the model's size.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from plait.errors import CheckpointError
from plait.files import read_object, write_json
from plait.models import safe
from plait.models.archive import Archive
from plait.models.leaves import Leaf, root, write_leaves
from plait.models.pickles import Pickled
from plait.models.specs import EMBEDDING, HEAD, LANGUAGE_MODEL, TIE, ties
from plait.models.stored import SIZES, Stored

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FILE_LIMIT = 5_000_000_000
BUFFERS = {
    "rotary buffers (inv_freq)": re.compile(
        r"(language_model\.)?model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    ),
    "counts of positions (position_ids)": re.compile(r"(\w+\.)*embeddings\.position_ids"),
}
"""What old files hold besides weights; it follows from the config. Nothing else may be dropped."""
SHORT_TOWER = re.compile(r"^vision_tower\.(?!vision_model\.)")
"""How transformers 5 writes the tower of a LLaVA; the published ones have ``.vision_model`` after it."""


class Tensors(Mapping[str, Tensor]):
    """Tensors that are computed when they are asked for; some names share one computation."""

    def __init__(self) -> None:
        """Start empty."""
        self._makers: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
        self._last: tuple[object, Mapping[str, Tensor]] = (None, {})

    def add(self, names: tuple[str, ...], make: Callable[[], Mapping[str, Tensor]]) -> None:
        """Promise ``names``, which ``make`` gives together."""
        self._makers |= dict.fromkeys(names, make)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; the last computation is kept, since its other names are mostly asked for next."""
        make = self._makers[name]
        if self._last[0] is not make:
            self._last = (make, make())
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class FolderTensors(Mapping[str, Tensor]):
    """The weights of a Hugging Face folder, by the names that published models have.

    They are safetensors, or ``pytorch_model.bin`` where there are none. The buffers of old files are left
    out and named in ``dropped``, and so is an output layer that the config ties to the embedding.
    """

    def __init__(self, folder: Path | str) -> None:
        """Find the files.

        Raises:
            CheckpointError: there are no weights in the folder, a listed file is missing, or one is broken;
                or the output layer is tied and is not the embedding.
        """
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self._where = self._locate()
        found = list(self._where)
        self._tied = self._copies(found)
        buffers = (name for name in found if any(kind.fullmatch(name) for kind in BUFFERS.values()))
        self.dropped = (*buffers, *self._tied)
        self._stored = {
            SHORT_TOWER.sub("vision_tower.vision_model.", name): name
            for name in found
            if name not in self.dropped
        }

    def _copies(self, found: Collection[str]) -> tuple[str, ...]:
        """The output layer's tensor, where the config says that it is the embedding."""
        config = self.folder / "config.json"
        below = LANGUAGE_MODEL if LANGUAGE_MODEL + EMBEDDING in found else ""
        ends = (below + EMBEDDING, below + HEAD)
        if not {*ends} <= {*found} or not config.is_file() or not ties(read_object(config), str(config)):
            return ()
        embedding, head = (fingerprint(self._handle(self._where[name]).get_tensor(name)) for name in ends)
        if embedding != head:
            raise CheckpointError(
                f"{self.folder} ties its output layer to the embedding, and holds another one",
                hint=f"if the output layer is its own, set {TIE} to false in config.json",
            )
        return (ends[1],)

    def _locate(self) -> dict[str, str]:
        """The file of every tensor, by the name that it has there."""
        for one, index in ((ONE, INDEX), (BIN, BIN_INDEX)):
            if (self.folder / index).is_file():
                return self._listed(index)
            if (self.folder / one).is_file():
                return dict.fromkeys(self._handle(one).keys(), one)
        raise CheckpointError(
            f"{self.folder} has neither {ONE} nor {INDEX}, nor {BIN} nor its index",
            hint="save the model with save_pretrained, or download its weights too",
        )

    def _listed(self, index: str) -> dict[str, str]:
        """What an index says, compared with the files that it names."""
        path = self.folder / index
        found = read_object(path).get("weight_map")
        if not isinstance(found, dict) or not found or not all(_is_name(file) for file in found.values()):
            raise CheckpointError(
                f"{path} has no weight_map of tensors to files beside it",
                hint=f"download {index} and the files that it lists anew",
            )
        for file in dict.fromkeys(found.values()):
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{self.folder / file} is missing; {index} lists it")
            held = set(self._handle(file).keys())
            lacking = sorted({name for name in found if found[name] == file} - held)
            if lacking:
                raise CheckpointError(
                    f"{self.folder / file} lacks {_some(lacking)}; {index} lists it there",
                    hint="the files are of different downloads: download them anew",
                )
            twice = sorted(name for name in held & found.keys() if found[name] != file)
            if twice:
                raise CheckpointError(
                    f"{self.folder / file} holds {_some(twice)}; {index} lists it in {found[twice[0]]}",
                    hint="the files are of different downloads: download them anew",
                )
        return dict(found)

    @property
    def pickled(self) -> bool:
        """Whether the weights are in PyTorch's older format."""
        return not any(file.endswith(".safetensors") for file in self._where.values())

    @property
    def as_stored(self) -> Tensors:
        """All that the files hold, buffers too, by the names that it has there."""
        tensors = Tensors()
        for name, file in self._where.items():
            tensors.add((name,), lambda n=name, f=file: {n: self._handle(f).get_tensor(n)})  # type: ignore[misc]
        return tensors

    @cached_property
    def placed(self) -> dict[str, Stored]:
        """Where every tensor stands, by its published name.

        Raises:
            CheckpointError: a file is not whole, or its header does not describe it.
        """
        files = {file: self.folder / file for file in self._where.values()}
        found = {
            file: safe.read(path) if path.suffix == ".safetensors" else Archive(path).content
            for file, path in files.items()
        }
        return {name: found[self._where[stored]][stored] for name, stored in self._stored.items()}

    @property
    def note(self) -> str:
        """The end of a log line that says what was dropped; empty where nothing was."""
        counts = {
            words: sum(bool(kind.fullmatch(name)) for name in self.dropped) for words, kind in BUFFERS.items()
        }
        tied = "".join(f", {name} left out: it is the embedding" for name in self._tied)
        return "".join(f", {count} {words} left out" for words, count in counts.items() if count) + tied

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            safe = file.endswith(".safetensors")
            self._open[file] = _safe(self.folder / file) if safe else Pickled(self.folder / file)
        return self._open[file]

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        tensor: Tensor = self._handle(self._where[stored]).get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without reading one."""
        return {
            name: tuple(self._handle(self._where[stored]).get_slice(stored).get_shape())
            for name, stored in self._stored.items()
        }


def _safe(path: Path) -> Any:
    """An open safetensors file."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is no whole safetensors file: {error}",
            hint="download or copy the file again",
        ) from error


def _is_name(value: object) -> bool:
    """Whether an index's word is the name of a file of weights in its own folder."""
    return isinstance(value, str) and "/" not in value and value.endswith((".safetensors", ".bin"))


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare what a checkpoint holds with what its config promises.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; the first few are named.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise CheckpointError(
                f"{where} {what} {_some(names)}; its config promises {len(expected)} tensors"
            )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(f"{where}: {name} has shape {tuple(found[name])}, its config says {shape}")


def write_safetensors(folder: Path, tensors: Mapping[str, Tensor], *, limit: int = FILE_LIMIT) -> None:
    """Write tensors in as many files as ``limit`` bytes a file ask for; one file has no index."""
    names: list[list[str]] = []
    total = 0
    for number, part in enumerate(_parts(tensors, limit)):
        save_file(part, folder / _part(number), metadata={"format": "pt"})
        names.append(list(part))
        total += sum(tensor.nbytes for tensor in part.values())
    if len(names) == 1:
        (folder / _part(0)).rename(folder / ONE)
        return
    where: dict[str, str] = {}
    for number, part_names in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / _part(number)).rename(folder / file)
        where |= dict.fromkeys(part_names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def lay_out(
    folder: Path, dtypes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], *, limit: int = FILE_LIMIT
) -> dict[str, Stored]:
    """Make safetensors files with room for tensors; where each of them stands.

    Args:
        folder: where the files go.
        dtypes: torch's names of the types, by name.
        shapes: the shapes.
        limit: bytes of a file.
    """
    parts: list[list[str]] = [[]]
    room = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * SIZES[dtypes[name]]
        if parts[-1] and room + size > limit:
            parts.append([])
            room = 0
        parts[-1].append(name)
        room, total = room + size, total + size
    found: dict[str, Stored] = {}
    where: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = ONE if len(parts) == 1 else f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        found |= safe.lay_out(folder / file, [(name, dtypes[name], shapes[name]) for name in names])
        where |= dict.fromkeys(names, file)
    if len(parts) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return found


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _parts(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    taken: set[int] = set()
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, taken, size = {}, set(), 0
        part[name] = _alone(tensor, taken)
        taken.add(part[name].untyped_storage().data_ptr())
        size += tensor.nbytes
    yield part


def _alone(tensor: Tensor, taken: Collection[int]) -> Tensor:
    """The tensor in storage of its own: safetensors refuses views of one storage, and two of one."""
    tensor = tensor.detach().contiguous()
    storage = tensor.untyped_storage()
    own = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in taken
    return tensor if own else tensor.clone()


def fingerprint(tensor: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    flat = tensor.detach().contiguous().flatten().view(uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def leaves_of(tensors: Mapping[str, Tensor]) -> dict[str, Leaf]:
    """What identifies each tensor of a model; one after the other is read."""
    return {
        name: Leaf(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), fingerprint(tensor))
        for name, tensor in tensors.items()
    }


def merkle(tensors: Mapping[str, Tensor]) -> str:
    """The root of a model, see :func:`plait.models.leaves.root`."""
    return root(leaves_of(tensors))


def write_down(built: FolderTensors) -> dict[str, str]:
    """Write down the tensors of a folder that was made, as they are read again; the facts of its manifest."""
    return {"merkle": write_leaves(built.folder, leaves_of(built))}


def _some(names: list[str]) -> str:
    shown, rest = names[:3], len(names[3:])
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def config_text(config: Mapping[str, Any]) -> str:
    """A config file as transformers would lay it out, with its keys sorted."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
