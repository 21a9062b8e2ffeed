"""The config.json of a run's model, also before the model is made: from the sources that are here."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.config import Plan
from plait.config.gguf import GgufModel
from plait.config.hub import HubModel
from plait.config.model import (
    ExtendedModel,
    ExtendedTokenizer,
    FolderModel,
    InitModel,
    LlavaModel,
    MixtralModel,
    ModelTokenizer,
    SoloModel,
    TowerModel,
)
from plait.errors import ConfigError
from plait.models import init, llava, tower
from plait.models.specs import SOLO, Spec
from plait.preflight.inputs import stands
from plait.tokens import tokenizer
from plait.tokens.pictures import OWN
from plait.tokens.vocabulary import GROUPS, IMAGE, PADDING

Values = dict[str, Any]


def config_of_run(plan: Plan, run: str) -> Values:
    """The config.json of the model that a run trains: the folder's, or what `plait build` would write.

    Raises:
        ConfigError: it follows from a file that is not here; the file is named.
    """
    return config_of(plan, plan.hf(plan.run(run).model).model)


def config_of(plan: Plan, name: str) -> Values:
    """The config.json of a model of ``raw_hf``; what follows from weights alone may lack."""
    folder = layout.HfModel(model=name)
    if stands(plan, folder):
        return files.read_object(Path(str(folder)) / "config.json")
    source = plan.config.raw_hf[name]
    return MADE[type(source)](plan, name, source)


def _given(plan: Plan, name: str, source: Any) -> Values:
    """That of a folder of the user's, of the hub, or of a GGUF file."""
    path = plan.config_file(source)
    if path.is_file():
        return files.read_object(path)
    if isinstance(source, HubModel):
        locked = plan.lock.commit(source)
        raise ConfigError(
            f"the shape of raw_hf.{name} is in config.json of {source.repo}, which is not here",
            hint=f"snakemake {path}" if locked else "`plait lock`, then `snakemake prefetch`",
        )
    raise ConfigError(
        f"the shape of raw_hf.{name} is in {path}, which is not there",
        hint=f"snakemake {path.parent}" if isinstance(source, GgufModel) else "",
    )


def _longer(plan: Plan, _: str, source: Any) -> Values:
    """A base with a row for every token of another tokenizer."""
    base = config_of(plan, source.base)
    return {**base, "vocab_size": max(base["vocab_size"], tokens(plan, source.tokenizer))}


def _solo(plan: Plan, name: str, source: Any) -> Values:
    seen = {"architectures": [SOLO], "model_type": "solo", "vision_patch_size": source.patch_size}
    return {**_longer(plan, name, source), **seen}


def _init(plan: Plan, _: str, source: Any) -> Values:
    return {**init.config_of(source), "vocab_size": tokens(plan, source.tokenizer)}


def _llava(plan: Plan, name: str, source: LlavaModel) -> Values:
    """Ids that no key names are those of tokens which ``image`` adds last; no shape follows from them."""
    text, seen = _longer(plan, name, source), config_of(plan, source.vision)
    given: dict[str, int | None] = {key: getattr(source, key) for key in OWN}
    rows = text["vocab_size"]
    last = {"image_token_id": (rows - 2, IMAGE), "pad_token_id": (rows - 1, PADDING)}
    ids: dict[str, tuple[int, str]] = {
        key: last[key] if token is None else (token, last[key][1]) for key, token in given.items()
    }
    return llava.config_of(source, text, tower.vision_config(seen, f"raw_hf.{source.vision}"), ids)


MADE: dict[type, Callable[[Plan, str, Any], Values]] = {
    FolderModel: _given,
    HubModel: _given,
    GgufModel: _given,
    InitModel: _init,
    MixtralModel: _init,
    TowerModel: lambda _plan, _name, source: tower.config_of(source),
    ExtendedModel: _longer,
    SoloModel: _solo,
    LlavaModel: _llava,
}
"""What says the shape of each kind of ``raw_hf``."""


def tokens(plan: Plan, name: str) -> int:
    """How many tokens a tokenizer has; one of a model that is not here yet: as many as the model's rows."""
    artifact = layout.Tokenizer(tokenizer=name)
    if stands(plan, artifact):
        return int(files.read_manifest(str(artifact))["facts"]["vocab_size"])
    source = plan.config.tokenizers[name]
    if isinstance(source, ExtendedTokenizer):
        return tokens(plan, source.base) + sum(len(GROUPS[group]) for group in source.add)
    if isinstance(source, ModelTokenizer):
        return Spec.from_config(config_of(plan, source.model)).vocab_size
    with tempfile.TemporaryDirectory(prefix="plait-preflight-") as folder:
        return int(tokenizer.build(Path(folder), source.model_dump())["vocab_size"])
