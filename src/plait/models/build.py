"""From an entry of ``config: raw_hf`` to a Hugging Face folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.config.model import ExtendedModel, FolderModel, InitModel, LlavaModel, SoloModel, TowerModel
from plait.errors import ConfigError
from plait.models.extend import extend
from plait.models.init import init
from plait.models.link import link
from plait.models.llava import llava
from plait.models.solo import solo
from plait.models.tower import init_tower

NEEDS: dict[str, tuple[str, ...]] = {
    "folder": (),
    "init": ("tokenizer",),
    "init_tower": (),
    "extend": ("base", "tokenizer"),
    "solo": ("base", "tokenizer"),
    "llava": ("base", "vision", "tokenizer"),
}
"""What each kind of model is made from, in the order of the command line."""


def build(folder: Path, source: Mapping[str, Any], parts: Sequence[Path]) -> dict[str, Any]:
    """Write a model into an empty folder; the facts of its manifest.

    Args:
        folder: where it goes.
        source: an entry of ``config: raw_hf``.
        parts: the base model, if it needs one, and the tokenizer.

    Raises:
        ConfigError: other parts were given than this kind of model is made from.
        CheckpointError: a part is not what it should be.
    """
    needs = NEEDS[source["kind"]]
    if len(parts) != len(needs):
        raise ConfigError(
            f"a model of kind {source['kind']} is made from {len(needs)} parts, {len(parts)} were given",
            hint=f"expected: {', '.join(needs) or 'the output alone'}",
        )
    if source["kind"] == "folder":
        return link(folder, FolderModel.model_validate(source))
    if source["kind"] == "init":
        return init(folder, InitModel.model_validate(source), tokenizer=parts[0])
    if source["kind"] == "init_tower":
        return init_tower(folder, TowerModel.model_validate(source))
    if source["kind"] == "llava":
        return llava(folder, LlavaModel.model_validate(source), *parts)
    base, tokenizer = parts
    if source["kind"] == "extend":
        return extend(folder, ExtendedModel.model_validate(source), base=base, tokenizer=tokenizer)
    return solo(folder, SoloModel.model_validate(source), base=base, tokenizer=tokenizer)
