"""From an entry of ``config: raw_hf`` to a Hugging Face folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plait.config.base import Strict
from plait.config.gguf import GgufModel
from plait.config.hub import HubModel
from plait.config.model import (
    ExtendedModel,
    FolderModel,
    InitModel,
    LlavaModel,
    MixtralModel,
    SoloModel,
    TowerModel,
)
from plait.errors import ConfigError
from plait.models.extend import extend
from plait.models.hub import hub
from plait.models.init import init
from plait.models.link import link
from plait.models.llava import llava
from plait.models.solo import solo
from plait.models.tower import init_tower


class Kind(NamedTuple):
    """How one kind of model is made: its settings, its builder, and what it is made from.

    ``needs`` are the builder's keywords, in the order of the command line.
    """

    settings: type[Strict]
    build: Callable[..., dict[str, Any]]
    needs: tuple[str, ...] = ()


def _gguf(folder: Path, settings: GgufModel) -> dict[str, Any]:
    """As the other builders; the package gguf is loaded by who needs it."""
    from plait.models.gguf.build import gguf

    return gguf(folder, settings)


KINDS = {
    "folder": Kind(FolderModel, link),
    "hub": Kind(HubModel, hub),
    "gguf": Kind(GgufModel, _gguf),
    "init": Kind(InitModel, init, ("tokenizer",)),
    "init_mixtral": Kind(MixtralModel, init, ("tokenizer",)),
    "init_tower": Kind(TowerModel, init_tower),
    "extend": Kind(ExtendedModel, extend, ("base", "tokenizer")),
    "solo": Kind(SoloModel, solo, ("base", "tokenizer")),
    "llava": Kind(LlavaModel, llava, ("base", "vision", "tokenizer")),
}


def build(folder: Path, source: Mapping[str, Any], parts: Sequence[Path]) -> dict[str, Any]:
    """Write a model into an empty folder; the facts of its manifest.

    Args:
        folder: where it goes.
        source: an entry of ``config: raw_hf``.
        parts: what the model is made from, in the order that its kind needs them.

    Raises:
        ConfigError: other parts were given than this kind of model is made from.
        CheckpointError: a part is not what it should be.
    """
    kind = KINDS[source["kind"]]
    if len(parts) != len(kind.needs):
        raise ConfigError(
            f"a model of kind {source['kind']} is made from {len(kind.needs)} parts, {len(parts)} were given",
            hint=f"expected: {', '.join(kind.needs) or 'the output alone'}",
        )
    settings = kind.settings.model_validate(source)
    return kind.build(folder, settings, **dict(zip(kind.needs, parts, strict=True)))
