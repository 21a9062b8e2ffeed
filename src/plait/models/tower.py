"""CLIP and SigLIP towers: random ones, and those that a folder holds."""

import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait import files
from plait.config.model import TowerModel
from plait.errors import CheckpointError
from plait.models.common import drawn
from plait.models.families.fields import part
from plait.models.towers import DEFAULTS, KINDS, Tower
from plait.models.weights import (
    FolderTensors,
    Tensors,
    check_shapes,
    config_text,
    write_down,
    write_safetensors,
)

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
PREFIX = "vision_model."
"""Before a tower's names in a whole CLIP or SigLIP, and in a tower that transformers 4 has written."""
PARTS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""The type of the tower in a folder of both towers, by the folder's ``model_type``."""
CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
BICUBIC = 3
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on (Radford et al. 2021), by channel, in 0..1."""

log = logging.getLogger(__name__)


def init_tower(folder: Path, settings: TowerModel) -> dict[str, Any]:
    """Write a random tower into an empty folder; the facts of its manifest."""
    config = config_of(settings)
    tower = Tower.from_config(config, where="raw_hf", drop_class_token=False)
    weights = drawn(tower.shapes, std=settings.initializer_range, seed=settings.seed)
    (folder / "config.json").write_text(config_text(config), encoding="utf-8")
    preprocessor = preprocessor_for(settings.architecture, settings.image_size)
    (folder / PREPROCESSOR).write_text(config_text(preprocessor), encoding="utf-8")
    write_safetensors(folder, weights)
    elements = sum(math.prod(shape) for shape in tower.shapes.values())
    log.info("%d tensors, %d parameters, %d features a picture", len(weights), elements, tower.tokens)
    return write_down(FolderTensors(folder))


@dataclass(frozen=True)
class OpenTower:
    """A tower's ``vision_config``, shape and tensors, named as below ``vision_model.``."""

    config: Mapping[str, Any]
    tower: Tower
    tensors: Tensors
    note: str
    """The end of a log line that says what of the folder is no part of the tower."""


def is_tower(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a vision tower, or of a whole CLIP or SigLIP."""
    return config.get("model_type") in (*KINDS, *PARTS)


def open_tower(folder: Path) -> OpenTower:
    """Read a folder that holds a tower alone, or the whole CLIP or SigLIP of which the tower is taken.

    Raises:
        CheckpointError: it holds neither, or not what its config says.
    """
    where = str(folder / "config.json")
    config = vision_config(files.read_object(folder / "config.json"), where)
    tower = Tower.from_config(config, where=where, drop_class_token=False)
    stored = FolderTensors(folder)
    below = [name for name in stored if name.startswith(PREFIX)] or list(stored)
    check_shapes(
        {name.removeprefix(PREFIX): stored.shapes[name] for name in below}, tower.shapes, str(folder)
    )
    tensors = Tensors()
    for name in below:
        short = name.removeprefix(PREFIX)
        tensors.add((short,), lambda short=short, name=name: {short: stored[name]})  # type: ignore[misc]
    others = len(stored) - len(below)
    note = stored.note + (f", {others} tensors beside the tower left out" if others else "")
    return OpenTower(config, tower, tensors, note)


def vision_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tower's config; old ones of OpenAI say it twice, and transformers heeds the second."""
    if config.get("model_type") not in PARTS:
        return dict(config)
    merged = part(config, "vision_config", where) | part(config, "vision_config_dict", where)
    return {**merged, "model_type": PARTS[config["model_type"]]}


def preprocessor_of(folder: Path, tower: Tower) -> str:
    """The text of preprocessor_config.json of a tower's folder, tried on a picture.

    Raises:
        CheckpointError: the folder does not say how pictures are prepared, or not as the tower needs them.
    """
    path, inside = folder / PREPROCESSOR, folder / PROCESSOR
    if path.is_file():
        files.read_object(path)
        text = path.read_text(encoding="utf-8")
    else:  # transformers 5 may write it into the processor's config
        found = files.read_object(inside).get("image_processor") if inside.is_file() else None
        if not found:
            raise CheckpointError(
                f"{folder} has no {PREPROCESSOR}, which says how pictures are resized and normalised",
                hint="download it with the tower; a guess would train on other pictures than the tower's",
            )
        text = config_text(found)
    shape, expected = _shape_of_a_picture(text, str(folder)), (3, tower.image_size, tower.image_size)
    if shape != expected:
        raise CheckpointError(f"{folder}: {PREPROCESSOR} makes pictures {shape}, the tower reads {expected}")
    return text


def _shape_of_a_picture(text: str, where: str) -> tuple[int, ...]:
    """What transformers makes of a wide picture."""
    from PIL import Image
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PREPROCESSOR).write_text(text, encoding="utf-8")
        try:
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            pixels = processor(images=Image.new("RGB", (60, 40)), return_tensors="np")["pixel_values"]
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{where}: transformers cannot read its {PREPROCESSOR}, or prepare a picture by it: {error}",
                hint="download the file of the tower anew",
            ) from error
    return tuple(int(size) for size in pixels[0].shape)


def config_of(settings: TowerModel) -> dict[str, Any]:
    """The config.json of a random tower."""
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


def preprocessor_for(kind: str, side: int) -> dict[str, Any]:
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
