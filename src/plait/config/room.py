"""What a run's checkpoints take on a disk at most, said before anything is trained."""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from plait import layout
from plait.config import disk
from plait.config.gguf import GgufModel
from plait.config.hub import HubModel
from plait.config.model import FolderModel, InitModel, TowerModel
from plait.config.paths import local
from plait.config.plan import Plan
from plait.files import read_json, read_object

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight, by the name that a config.json has for its type; where it has none, 2."""
WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin")
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
"""Sizes of a vision tower that its parameters follow from, but for norms and biases."""
STATES = 3
"""States against a crash that stand at once: the newest two, and the one that is being written."""


def said(plan: Plan, name: str, asked: Collection[int], **stay: Collection[int]) -> str:
    """A line on the disk that a run takes.

    Args:
        plan: the config.
        name: the run.
        asked: its iterations that are asked for.
        stay: those that nothing removes, as :class:`plait.config.disk.Thinning` has them.
    """
    run, schedule = plan.run(name), plan.schedule_as_known(name)
    found = parameters(plan, plan.hf(run.model).model)
    if not found:
        return f"Run {name}: what its checkpoints take is known as soon as its model is here."
    keys = run.model_dump(mode="json")
    weights, optimizer = disk.sizes(keys, found, trained=trained(plan, run.model, run.freeze, found))
    rule = disk.Thinning.of(keys, schedule.train_iters if schedule else 0, **stay)
    peak = rule.peak(asked, weights=weights, optimizer=optimizer, together=run.saves_per_job)
    states = STATES * (weights + optimizer) if run.non_persistent_save_interval else 0
    more = f", {states / GB:.3g} GB of it states against a crash" if states else ""
    free = shutil.disk_usage("data" if Path("data").exists() else ".").free
    return (
        f"Run {name}: {len(asked)} checkpoints of about {weights / GB:.3g} GB of weights and "
        f"{optimizer / GB:.3g} GB of optimizer each take at most {(peak + states) / GB:.3g} GB at once "
        f"(keep: {run.keep}, save_optim: {run.save_optim}{more}); {free / GB:.3g} GB are free."
    )


def parameters(plan: Plan, model: str) -> float:
    """About how many parameters a Hugging Face model has, by the size of its files; 0 if nothing tells.

    A model that is still to be built is about as large as what it is built of.
    """
    source, folder = plan.config.raw_hf[model], Path(str(layout.HfModel(model=model)))
    if (folder / layout.MANIFEST).is_file():
        listed = read_object(folder / layout.MANIFEST)["files"]
        return _by_files({name: entry["bytes"] for name, entry in listed.items()}, folder / "config.json")
    if isinstance(source, FolderModel):
        place = local(source.path)
        return _by_files(
            {path.name: path.stat().st_size for path in place.glob("*")}, plan.config_file(source)
        )
    if isinstance(source, HubModel):
        tree = plan.lock.tree(source.tree)
        listed = {name: entry.bytes or 0 for name, entry in tree.files.items()} if tree else {}
        return _by_files(listed, plan.config_file(source))
    if isinstance(source, InitModel | TowerModel | GgufModel):
        return 0.0
    bases = [getattr(source, key) for key in ("base", "vision") if getattr(source, key, "")]
    sizes = [parameters(plan, base) for base in bases]
    return sum(sizes) if all(sizes) else 0.0


def trained(plan: Plan, model: str, freeze: Collection[str], whole: float) -> float:
    """About how many of a model's ``whole`` parameters are trained; all, if nothing tells of its parts."""
    text, tower = plan.shape(model), plan.tower_shape(model)
    if "hidden_size" not in text or not set(TOWER) <= tower.keys():
        return whole
    width, inner, layers, side, patch = (tower[key] for key in TOWER)
    parts: dict[str, float] = {
        "vision_model": layers * (4 * width**2 + 2 * width * inner)
        + (3 * patch**2 + (side // patch) ** 2) * width,
        "vision_projection": plan.projector_size(model) * (width + text["hidden_size"]),
    }
    parts["language_model"] = whole - sum(parts.values())
    return sum(size for part, size in parts.items() if part not in freeze)


def _by_files(found: Mapping[str, int], config: Path) -> float:
    bytes_ = sum(size for name, size in found.items() if WEIGHTS.fullmatch(name))
    said: dict[str, Any] = read_json(config) if config.is_file() else {}
    return bytes_ / BYTES.get(str(said.get("dtype") or said.get("torch_dtype")), 2)
