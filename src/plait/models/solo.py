"""SOLO: a base model, vision tokens, and one projection from a patch of pixels to a token's place.

transformers has no such class, so the folder carries its code: configuration, model and processor.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.config.model import SoloModel
from plait.errors import CheckpointError
from plait.models.common import (
    check_carried,
    copy_tokenizer,
    normal,
    open_base,
    read_named,
    tokenizer_facts,
    with_rows,
    write_configs,
)
from plait.models.specs import LLAMA, SOLO
from plait.models.weights import FolderTensors, config_text, write_down, write_safetensors

REMOTE = Path(__file__).parent / "remote"
PROJECTION = "model.embed_vision_patch.weight"
STD = 0.02
KNOWN = ("MistralForCausalLM", LLAMA)
"""What SOLO can be made from: its class is a Mistral, which has no biases."""
AUTO_MAP = {
    "AutoConfig": "configuration_solo.SoloConfig",
    "AutoModelForCausalLM": "modeling_solo.SoloForCausalLM",
    "AutoProcessor": "processing_solo.SoloProcessor",
}

log = logging.getLogger(__name__)


def solo(folder: Path, settings: SoloModel, *, base: Path, tokenizer: Path) -> dict[str, Any]:
    """Write the model into an empty folder; the facts of its manifest.

    Raises:
        CheckpointError: the base is not what its config says, or the tokenizer has no vision tokens.
    """
    facts = tokenizer_facts(tokenizer)
    if not facts.get("vision"):
        raise CheckpointError(
            f"{tokenizer} has no vision tokens",
            hint="extend a tokenizer by `add: [vision]` in config/ and name it here",
        )
    config, tensors = open_base(base, known=KNOWN)
    std = config.get("initializer_range", STD)
    grown = with_rows(
        tensors, vocab_size=facts["vocab_size"], policy=settings.new_rows, std=std, seed=settings.seed
    )
    shape = (config["hidden_size"], 3 * settings.patch_size**2)
    dtype = tensors["model.embed_tokens.weight"].dtype
    projection = _projection(settings, shape).to(dtype)
    grown.add((PROJECTION,), lambda: {PROJECTION: projection})
    copy_tokenizer(tokenizer, folder)
    write_configs(folder, _config(config, settings, facts["vision"]), facts)
    write_code(folder)
    _write_processor(folder, settings)
    write_safetensors(folder, grown)
    built = FolderTensors(folder)
    carried = check_carried(tensors, built)
    sizes = (config["vocab_size"], facts["vocab_size"])
    log.info("%d tensors carried, %d -> %d tokens%s", carried, *sizes, tensors.note)
    return write_down(built)


def _projection(settings: SoloModel, shape: tuple[int, int]) -> Tensor:
    """The patch projection [D, P]: that of a file, or a drawn one."""
    if settings.projection is None:
        return normal(PROJECTION, shape, std=STD, seed=settings.seed)
    end = PROJECTION.removeprefix("model.")
    return read_named(settings.projection, {end: shape}, key="raw_hf.*.projection")[end]


def write_code(folder: Path) -> None:
    """Copy the code that transformers loads with ``trust_remote_code=True``."""
    for source in sorted(REMOTE.glob("*_solo.py")):
        shutil.copyfile(source, folder / source.name)


def _config(base: dict[str, Any], settings: SoloModel, vision: dict[str, int]) -> dict[str, Any]:
    return {
        **base,
        "architectures": [SOLO],
        "model_type": "solo",
        "auto_map": AUTO_MAP,
        "vision_patch_size": settings.patch_size,
        "vision_token_ids": vision,
    }


def _write_processor(folder: Path, settings: SoloModel) -> None:
    processor = {
        "processor_class": "SoloProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "patch_size": settings.patch_size,
        "max_resolution": settings.max_resolution,
    }
    (folder / "processor_config.json").write_text(config_text(processor), encoding="utf-8")
