"""What every model that plait makes shares: random rows, tokenizer files and config files."""

import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait import files
from plait.config.paths import local
from plait.errors import CheckpointError
from plait.models.specs import EMBEDDING, HEAD, Spec
from plait.models.weights import FolderTensors, Tensors, check_shapes, config_text, fingerprint

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

NORM = re.compile(r"(norm|layer_norm\d)\.weight$")
EMBEDDINGS = (EMBEDDING, HEAD)


def normal(name: str, shape: tuple[int, ...], *, std: float, seed: int) -> Tensor:
    """N(0, std) in fp32. A stream of its own for each name: the order of the tensors does not enter."""
    words = np.frombuffer(name.encode(), dtype=np.uint8).tolist()
    generator = np.random.Generator(np.random.PCG64([seed, *words]))
    values: NDArray[np.float32] = generator.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values * np.float32(std))


def drawn(shapes: Mapping[str, tuple[int, ...]], *, std: float, seed: int) -> Tensors:
    """Random tensors in fp32, equal for equal names: norms are ones, biases zeros, all else N(0, std)."""

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        return torch.ones(shape) if NORM.search(name) else normal(name, shape, std=std, seed=seed)

    tensors = Tensors()
    for name, shape in shapes.items():
        tensors.add((name,), lambda name=name, shape=shape: {name: make(name, shape)})  # type: ignore[misc]
    return tensors


def tokenizer_facts(tokenizer: Path) -> dict[str, Any]:
    """The sizes and ids that a tokenizer's manifest records."""
    facts: dict[str, Any] = files.read_manifest(tokenizer, kind="tokenizer")["facts"]
    return facts


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy a tokenizer's files, but for its manifest, into a model's folder."""
    for name in sorted(files.read_manifest(tokenizer, kind="tokenizer")["files"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenizer / name, folder / name)


def write_configs(folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write config.json and generation_config.json with the tokenizer's size and ids.

    Vision tokens stand for pictures, so generation never writes them.
    """
    ids = {"bos_token_id": facts["bos_id"], "eos_token_id": facts["eos_id"]}
    (folder / "config.json").write_text(
        config_text({**config, **ids, "vocab_size": facts["vocab_size"]}), encoding="utf-8"
    )
    generation: dict[str, Any] = {"_from_model_config": False, **ids}
    if facts.get("vision"):
        generation["suppress_tokens"] = sorted(facts["vision"].values())
    (folder / "generation_config.json").write_text(config_text(generation), encoding="utf-8")


def open_base(base: Path, *, known: Collection[str]) -> tuple[dict[str, Any], FolderTensors]:
    """A base model's config and tensors, checked against each other.

    Args:
        base: its folder.
        known: the architectures that can be a base of what is made.

    Raises:
        CheckpointError: they do not agree, or the model is of another kind.
    """
    path = base / "config.json"
    config = files.read_object(path)
    spec = Spec.from_config(config, where=str(path))
    if spec.architecture not in known:
        raise CheckpointError(
            f"{base} is a {spec.architecture}", hint=f"this model is made from {' or '.join(known)}"
        )
    tensors = FolderTensors(base)
    check_shapes(tensors.shapes, spec.shapes, str(base))
    return config, tensors


def with_rows(base: FolderTensors, *, vocab_size: int, policy: str, std: float, seed: int) -> Tensors:
    """A base's tensors, with rows for new tokens under those it has.

    Args:
        base: the base's tensors.
        vocab_size: rows wanted.
        policy: ``mean`` of the base's rows, ``normal`` or ``zeros``.
        std: standard deviation of ``normal``.
        seed: seed of ``normal``.

    Raises:
        CheckpointError: the base has more rows than the tokenizer has tokens.
    """
    rows = base.shapes[EMBEDDINGS[0]][0]
    if rows > vocab_size:
        raise CheckpointError(
            f"{base.folder} has {rows} token rows, the tokenizer {vocab_size} tokens",
            hint="give the tokenizer that extends the base's own",
        )

    def longer(name: str) -> dict[str, Tensor]:
        old = base[name]
        shape = (vocab_size - rows, old.shape[1])
        if policy == "mean":
            mean = torch.from_numpy(old.float().numpy().mean(axis=0, dtype=np.float64))
            new = mean.expand(shape)
        else:
            new = normal(name, shape, std=std, seed=seed) if policy == "normal" else torch.zeros(shape)
        return {name: torch.cat((old, new.to(old.dtype)))}

    grown = Tensors()
    for name in base:
        if name in EMBEDDINGS and rows < vocab_size:
            grown.add((name,), lambda name=name: longer(name))  # type: ignore[misc]
        else:
            grown.add((name,), lambda name=name: {name: base[name]})  # type: ignore[misc]
    return grown


def check_carried(source: Mapping[str, Tensor], built: FolderTensors, *, prefix: str = "") -> int:
    """Check that every tensor of a part stands in what was built, bit for bit; how many do.

    Args:
        source: the part's tensors; the built one may have more rows.
        built: the whole.
        prefix: what stands before the part's names in the whole.

    Raises:
        CheckpointError: one does not; it is named.
    """
    for name, tensor in source.items():
        if fingerprint(built[prefix + name][: len(tensor)]) != fingerprint(tensor):
            raise CheckpointError(f"{built.folder}: {prefix}{name} is not what its source has")
    return len(source)


def read_named(file: str, shapes: Mapping[str, tuple[int, ...]], *, key: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, found by the ends of their names.

    Args:
        file: the file, as the config has it.
        shapes: the ends of names that are wanted, and their shapes.
        key: the config's key that named the file.

    Raises:
        CheckpointError: the file is not there, lacks one of them, has two of one name, or another shape.
    """
    path = local(file)
    if not path.is_file():
        raise CheckpointError(f"{key} names {file}, which is no file")
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as stored:
            names = sorted(stored.keys())
            for end in shapes:
                full = [name for name in names if name == end or name.endswith(f".{end}")]
                if len(full) > 1:
                    raise CheckpointError(f"{path} has {' and '.join(full)}; {key} needs one {end}")
                if full:
                    found[end] = stored.get_tensor(full[0])
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    check_shapes({name: tuple(tensor.shape) for name, tensor in found.items()}, shapes, str(path))
    log.info("%d of the %d tensors of %s read", len(found), len(names), path.name)
    return found
