"""Megatron checkpoints that a user has put where plait would write them, in every layout that is read here.

Their names and shapes are compared with the config of the Hugging Face model that the plan has for them,
and so are the weights of a model that is said to be a conversion of it. Config files that plait keeps beside
a checkpoint come from that model.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plait import files
from plait.convert import carried, checkpoint, folders, forms, layouts, tables
from plait.errors import CheckpointError
from plait.fetch.lfs import refuse_pointers
from plait.foreign import Found
from plait.layout import HF_CONFIG, MANIFEST, TRACKER, Iteration, Megatron, Sharded
from plait.models import leaves
from plait.models.specs import Spec
from plait.parallel.grid import Grid


def model(target: Megatron | Sharded, hf: Path, settings: Mapping[str, Any]) -> Found:
    """A whole or sharded model in the classic layout, ``release`` or ``iter_*``.

    Raises:
        CheckpointError: it cannot be read, is cut for another grid, or has other weights than its source.
    """
    folder, spec = Path(str(target)), Spec.of(hf)
    sizes = {"tp": target.tp, "pp": target.pp} if isinstance(target, Sharded) else {"tp": 1, "pp": 1}
    first, last = (settings.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last"))
    grid = Grid(**sizes, first=first, last=last)
    ranks = [checkpoint.saved(folder) / grid.folder(tp=tp, pp=pp) / checkpoint.FILE for tp, pp in grid]
    refuse_pointers(ranks)
    with _completed(folder, hf, spec) as (whole, beside):
        model = layouts.released(whole, spec, grid)
        root = leaves.root(model.stream())
        args = checkpoint.read_args(whole, grid)
        checkpoint.refuse_padding(ranks[0], args, spec, grid)
        padded = checkpoint.is_padded(args)
        types = folders.dtypes(spec, model.dtypes)
    expected = files.read_manifest(hf, kind="hf_model")["facts"]["merkle"]
    if root != expected:
        raise CheckpointError(
            f"{target} has other weights than {hf}, which config/ says it is converted from: Merkle root "
            f"{root[:12]}, not {expected[:12]}",
            hint="a model that was trained further is adopted as data/ckpts/RUN/iter_NNNNNNN",
        )
    facts = {"merkle": root, "coverage": forms.coverage(spec, grid if padded else None), "grid": grid.facts}
    paths = [*ranks, *(folder / name for name in (TRACKER, HF_CONFIG) if (folder / name).is_file())]
    kind = "sharded" if isinstance(target, Sharded) else "megatron"
    facts |= {"tokenizer": folders.digest_of_tokenizer(hf), "dtypes": types}
    return _found(kind, folder, paths, facts, beside)


def iteration(target: Iteration, hf: Path, settings: Mapping[str, Any]) -> Found:
    """A training checkpoint: torch_dist, or the classic layout with the ranks in its folder.

    Raises:
        CheckpointError: it cannot be read, or is not of the model that config/ says it is.
    """
    folder, spec = Path(str(target)), Spec.of(hf)
    grid = Grid(
        tp=settings["tensor_model_parallel_size"],
        pp=settings["pipeline_model_parallel_size"],
        first=settings["num_layers_in_first_pipeline_stage"],
        last=settings["num_layers_in_last_pipeline_stage"],
    )
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    refuse_pointers(found)
    with _completed(folder, hf, spec) as (whole, beside):
        root = leaves.root(layouts.trained(whole, spec).stream())
    facts = {"merkle": root, "coverage": forms.coverage(spec, grid), "grid": grid.facts}
    facts["tokenizer"] = folders.digest_of_tokenizer(hf)
    return _found("iteration", folder, found, facts, beside)


def _found(
    kind: str, folder: Path, paths: list[Path], facts: Mapping[str, Any], beside: Mapping[str, bytes]
) -> Found:
    return Found(kind, [path.relative_to(folder).as_posix() for path in paths], facts, beside)


@contextmanager
def _completed(folder: Path, hf: Path, spec: Spec) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """Links to a checkpoint's files beside what goes along with it; and the content of what it lacks.

    Raises:
        CheckpointError: the checkpoint has the config of another model beside it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary)
        carried.take_along(hf, whole)
        model = layouts.of_hf(hf, spec, only=tables.carried(spec))
        model.stream(carried.lay_out(whole, spec, model.dtypes), digests=False)
        beside = {
            path.name: path.read_bytes() for path in whole.iterdir() if not (folder / path.name).exists()
        }
        if HF_CONFIG not in beside and (folder / HF_CONFIG).read_bytes() != (whole / HF_CONFIG).read_bytes():
            raise CheckpointError(
                f"{folder / HF_CONFIG} is not the config.json of {hf}",
                hint="name the model that it was made from as the source of this one in config/",
            )
        for path in folder.iterdir():
            if path.name not in beside:
                (whole / path.name).unlink(missing_ok=True)
                (whole / path.name).symlink_to(path.resolve())
        yield whole, beside
