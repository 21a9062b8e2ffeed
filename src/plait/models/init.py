"""A Mistral- or Mixtral-shaped model with random weights, equal for equal settings."""

import logging
from pathlib import Path
from typing import Any

import torch

from plait.config.model import InitModel, MixtralModel
from plait.models.common import copy_tokenizer, drawn, tokenizer_facts, write_configs
from plait.models.specs import MIXTRAL, Spec
from plait.models.weights import FolderTensors, write_down, write_safetensors

ARCHITECTURES = {"init": ("MistralForCausalLM", "mistral"), "init_mixtral": (MIXTRAL, "mixtral")}
"""Class and ``model_type`` by the kind of model."""

log = logging.getLogger(__name__)


def init(folder: Path, settings: InitModel | MixtralModel, *, tokenizer: Path) -> dict[str, Any]:
    """Write the model into an empty folder; the facts of its manifest.

    Norms are ones, all else is N(0, ``initializer_range``) in fp32.
    """
    facts = tokenizer_facts(tokenizer)
    config = config_of(settings)
    spec = Spec.from_config({**config, "vocab_size": facts["vocab_size"]})
    copy_tokenizer(tokenizer, folder)
    write_configs(folder, config, facts)
    write_safetensors(folder, drawn(spec.shapes, std=settings.initializer_range, seed=settings.seed))
    elements = sum(torch.Size(shape).numel() for shape in spec.shapes.values())
    log.info("%d tensors, %d parameters", len(spec.shapes), elements)
    return write_down(FolderTensors(folder))


def config_of(settings: InitModel | MixtralModel) -> dict[str, Any]:
    """The model's config.json, but for what the tokenizer says."""
    sizes = settings.model_dump(exclude={"kind", "tokenizer", "seed"})
    architecture, model_type = ARCHITECTURES[settings.kind]
    return {
        **sizes,
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "float32",
    }
