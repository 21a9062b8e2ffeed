"""The stages of conversion, folder to folder: each proves what it wrote by reading it back."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from plait import files
from plait.convert import checkpoint, engine
from plait.convert.carried import carry, hf_view, take_along
from plait.errors import CheckpointError
from plait.layout import HF_CONFIG, MANIFEST
from plait.models.specs import Spec
from plait.models.weights import FolderTensors, check_shapes, merkle, outline
from plait.parallel.grid import Grid

GIGA = 1e9
TOKENIZER = "tokenizer.json"

log = logging.getLogger(__name__)


def convert(source: Path, folder: Path) -> dict[str, Any]:
    """Write a Hugging Face model as a whole Megatron one; the facts of its manifest.

    ``tokenizer`` among them is the sha256 of the source's tokenizer.json: training compares it with
    that of its data, for tokenizers of equal size can be told apart by nothing else.

    Raises:
        CheckpointError: the source does not hold what its config promises, or what was written
            does not read back as it was.
    """
    spec = Spec.of(source)
    hf = FolderTensors(source)
    check_shapes(hf.shapes, spec.shapes, str(source))
    mcore = engine.to_mcore(hf, spec)
    size = checkpoint.write_rank(
        checkpoint.rank_file(folder, Grid(), 0, 0),
        mcore,
        outline=engine.to_mcore(outline(hf), spec),
        args=checkpoint.megatron_args(spec, None),
    )
    take_along(source, folder, hf, spec)
    checkpoint.write_tracker(folder)
    log.info("%d tensors -> %d tensors, %s%s", len(hf), len(mcore), _bytes(size), hf.note)
    facts = _facts(folder, spec, None, expected=merkle(hf))
    return {**facts, "tokenizer": digest_of_tokenizer(source), "dtypes": dtypes(mcore)}


def shard(source: Path, folder: Path, grid: Grid) -> dict[str, Any]:
    """Cut a whole Megatron model for a grid; the facts of its manifest.

    Raises:
        CheckpointError: as :func:`convert`.
        ConfigError: the model cannot be cut for this grid.
    """
    spec = Spec.of(source, HF_CONFIG)
    whole = checkpoint.read_whole(source, Grid())
    engine.rank_shapes(spec, grid)
    plan = outline(whole)
    args = checkpoint.megatron_args(spec, grid)
    sizes = []
    for tp, pp in grid:
        state = engine.cut(whole, spec, grid, tp, pp)
        shapes = engine.cut(plan, spec, grid, tp, pp)
        path = checkpoint.rank_file(folder, grid, tp, pp)
        sizes.append(checkpoint.write_rank(path, state, outline=shapes, args=args))
    carry(source, folder)
    checkpoint.write_tracker(folder)
    log.info("%d tensors -> %s, %s per rank", len(whole), grid, _bytes(max(sizes)))
    facts = _facts(folder, spec, grid, expected=merkle(hf_view(whole, spec, source)))
    return {**facts, "tokenizer": _carried_digest(source), "dtypes": dtypes(whole)}


def root_of_shards(folder: Path, spec: Spec, grid: Grid) -> str:
    """The Merkle root of the Hugging Face view of a released checkpoint, from what is on disk."""
    return merkle(hf_view(checkpoint.read_whole(folder, grid), spec, folder))


def digest_of_tokenizer(source: Path) -> str:
    """What `plait tokenizer` would write of it: a folder that was adopted may have an older form."""
    if (source / MANIFEST).is_file():
        known = files.read_manifest(source)["facts"].get(TOKENIZER)
        if known:
            return str(known)
    path = source / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{source} has no {TOKENIZER}", hint="`plait build` makes or links one")
    return files.digest(path)


def _carried_digest(source: Path) -> str:
    facts = files.read_manifest(source, kind="megatron")["facts"]
    if "tokenizer" not in facts:
        raise CheckpointError(
            f"{source} does not say which tokenizer its model has", hint="`plait convert` makes it anew"
        )
    return str(facts["tokenizer"])


def _facts(folder: Path, spec: Spec, grid: Grid | None, *, expected: str) -> dict[str, Any]:
    size = grid or Grid()
    root = root_of_shards(folder, spec, size)
    if root != expected:
        raise CheckpointError(f"what was written has Merkle root {root[:12]}, its source {expected[:12]}")
    return {
        "merkle": root,
        "coverage": engine.coverage(spec, grid),
        "grid": size.facts,
    }


def dtypes(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The types of a Megatron model's tensors, by part: ``vision_model`` and so on in a LLaVA model."""
    found: dict[str, set[str]] = {}
    for name, tensor in outline(tensors).items():
        found.setdefault(name.split(".")[0], set()).add(str(tensor.dtype).removeprefix("torch."))
    return {part: sorted(types) for part, types in sorted(found.items())}


def _bytes(size: int) -> str:
    return f"{size / GIGA:.1f} GB" if size >= GIGA else f"{size / 1e6:.1f} MB"
