"""Tensors of a Hugging Face folder, read one at a time, written in files of a bounded size.

A :class:`Tensors` is a lazy mapping: asking for a name reads or computes that tensor, iterating
asks for names only. So a conversion holds one row of a model in memory, whatever the model's size.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from plait.errors import CheckpointError
from plait.files import canonical, read_json, write_json

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
    """The safetensors of a Hugging Face folder, by the names that published models have.

    The buffers of old files are left out and named in ``dropped``.
    """

    def __init__(self, folder: Path | str) -> None:
        """Find the files.

        Raises:
            CheckpointError: there are no safetensors in the folder, or a listed file is missing.
        """
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        if (self.folder / INDEX).is_file():
            found: dict[str, str] = read_json(self.folder / INDEX)["weight_map"]
        elif (self.folder / ONE).is_file():
            found = dict.fromkeys(self._handle(ONE).keys(), ONE)
        else:
            raise CheckpointError(
                f"{self.folder} has neither {ONE} nor {INDEX}",
                hint="save the model with safe_serialization=True",
            )
        self.dropped = tuple(name for name in found if any(kind.fullmatch(name) for kind in BUFFERS.values()))
        self._places = {
            SHORT_TOWER.sub("vision_tower.vision_model.", name): (file, name)
            for name, file in found.items()
            if name not in self.dropped
        }

    @property
    def note(self) -> str:
        """The end of a log line that says what was dropped; empty where nothing was."""
        counts = {
            words: sum(bool(kind.fullmatch(name)) for name in self.dropped) for words, kind in BUFFERS.items()
        }
        return "".join(f", {count} {words} left out" for words, count in counts.items() if count)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{self.folder / file} is missing; {INDEX} lists it")
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        tensor: Tensor = self._handle(file).get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without reading one."""
        return {
            name: tuple(self._handle(file).get_slice(stored).get_shape())
            for name, (file, stored) in self._places.items()
        }


def outline(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names, shapes and types on the meta device, where nothing is read or computed."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


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


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _parts(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = _alone(tensor)
        size += tensor.nbytes
    yield part


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in storage of its own: safetensors refuses views of one storage."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def fingerprint(tensor: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    flat = tensor.detach().contiguous().flatten().view(uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def merkle(tensors: Mapping[str, Tensor]) -> str:
    """The root of a model: a digest over every name, dtype, shape and digest of bytes, by name.

    Equal roots mean bit-equal models; files, order and grid do not enter.
    """
    leaves = []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        leaves.append([name, dtype, list(tensor.shape), fingerprint(tensor)])
    return hashlib.sha256(canonical(sorted(leaves)).encode()).hexdigest()


def _some(names: list[str]) -> str:
    shown, rest = names[:3], len(names[3:])
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def config_text(config: Mapping[str, Any]) -> str:
    """A config file as transformers would lay it out, with its keys sorted."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
