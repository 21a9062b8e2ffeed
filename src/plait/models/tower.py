"""CLIP and SigLIP towers: random ones, and those that a folder holds."""

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.config.model import TowerModel
from plait.errors import CheckpointError
from plait.files import read_json
from plait.models.common import drawn
from plait.models.towers import DEFAULTS, KINDS, Tower
from plait.models.weights import FolderTensors, Tensors, check_shapes, config_text, merkle, write_safetensors

PREPROCESSOR = "preprocessor_config.json"
PARTS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""The type of the tower in a folder of both towers, by the folder's ``model_type``."""
CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
NOT_WEIGHTS = re.compile(r"embeddings\.position_ids$")
"""A buffer of old folders; it counts positions."""
BICUBIC = 3
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on (Radford et al. 2021), by channel, in 0..1."""

log = logging.getLogger(__name__)


def init_tower(folder: Path, settings: TowerModel) -> dict[str, Any]:
    """Write a random tower into an empty folder; the facts of its manifest."""
    config = _config(settings)
    tower = read_tower_config(config, where="config")
    weights = drawn(tower.shapes, std=settings.initializer_range, seed=settings.seed)
    (folder / "config.json").write_text(config_text(config), encoding="utf-8")
    preprocessor = _preprocessor(settings.architecture, settings.image_size)
    (folder / PREPROCESSOR).write_text(config_text(preprocessor), encoding="utf-8")
    write_safetensors(folder, weights)
    log.info("%d tensors, %d features a picture", len(weights), tower.tokens)
    return {"merkle": merkle(FolderTensors(folder))}


def read_tower_config(config: dict[str, Any], *, where: str) -> Tower:
    """A tower by itself: all of its features are kept."""
    return Tower.from_config(config, where=where, drop_class_token=False)


def open_tower(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """The ``vision_config`` and the tensors of a tower, named as below ``vision_model.``.

    The folder holds a tower alone, or the whole CLIP or SigLIP of which the tower is taken.

    Raises:
        CheckpointError: it holds neither, or not what its config says.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") in PARTS:
        config = {"model_type": PARTS[config["model_type"]], **(config.get("vision_config") or {})}
    tower = read_tower_config(config, where=str(folder / "config.json"))
    stored = FolderTensors(folder)
    whole = any(name.startswith("vision_model.") for name in stored)
    names = {
        name.removeprefix("vision_model."): name
        for name in stored
        if (name.startswith("vision_model.") or not whole) and not NOT_WEIGHTS.search(name)
    }
    check_shapes({below: stored.shapes[name] for below, name in names.items()}, tower.shapes, str(folder))
    tensors = Tensors()
    for below, name in names.items():
        tensors.add((below,), lambda below=below, name=name: {below: _take(stored, name)})  # type: ignore[misc]
    return config, tensors


def _take(stored: FolderTensors, name: str) -> Tensor:
    return stored[name]


def preprocessor_of(folder: Path) -> Path:
    """How a tower's pictures are prepared.

    Raises:
        CheckpointError: the folder does not say.
    """
    path = folder / PREPROCESSOR
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {PREPROCESSOR}, which says how pictures are resized and normalised",
            hint="download it with the tower; a guess would train on other pictures than the tower's",
        )
    return path


def _config(settings: TowerModel) -> dict[str, Any]:
    sizes = settings.model_dump(exclude={"kind", "architecture", "seed"})
    kind = next(name for name, short in KINDS.items() if short == settings.architecture)
    fixed = {key: DEFAULTS[settings.architecture][key] for key in ("hidden_act", "layer_norm_eps")}
    return {
        **sizes,
        **fixed,
        "architectures": [CLASSES[settings.architecture]],
        "model_type": kind,
        "num_channels": 3,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }


def _preprocessor(kind: str, side: int) -> dict[str, Any]:
    """What transformers' own processors of these towers do, at another size."""
    square = {"height": side, "width": side}
    common = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": BICUBIC,
    }
    if kind == "siglip":
        half = [0.5, 0.5, 0.5]
        own = {"image_processor_type": "SiglipImageProcessor", "size": square}
        return {**common, **own, "image_mean": half, "image_std": half}
    return {
        **common,
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": square,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
