"""Which token stands for a picture, and which for padding.

A model's ``config.json`` says both; training, export and proof read them from there. Before there is a model,
``raw_hf`` of the config or the tokenizer's manifest says them: they are chosen here, and nowhere else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from plait.errors import ConfigError
from plait.layout import FAST
from plait.tokens.vocabulary import IMAGE, PADDING

Key = Literal["image_token_id", "pad_token_id"]
OWN: dict[Key, str] = {"image_token_id": IMAGE, "pad_token_id": PADDING}
"""The tokens that are made for it."""


def ids_of(vocabulary: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int | None]:
    """What a tokenizer's manifest says of both: as a LLaVA's config.json beside it, or those made for it."""
    stated = {
        "image_token_id": config.get("image_token_id", config.get("image_token_index")),
        "pad_token_id": config.get("pad_token_id"),
    }
    sees = stated["image_token_id"] is not None
    return {key: stated[key] if sees and stated[key] is not None else vocabulary.get(OWN[key]) for key in OWN}


def special(folder: Path, facts: Mapping[str, Any], key: Key, chosen: int | None) -> tuple[int, str]:
    """The id and the name of a picture's token, or of padding's.

    Args:
        folder: the tokenizer.
        facts: those of its manifest.
        key: which of the two.
        chosen: the id that a model has for it; None: the tokenizer's own.

    Raises:
        ConfigError: the tokenizer has no such token, does not read its name as it wherever it stands, or has
            another use for it in texts.
    """
    inner = Tokenizer.from_file(str(folder / FAST))
    token = facts[key] if chosen is None else chosen
    name = None if token is None or token >= facts["vocab_size"] else inner.id_to_token(token)
    if token is None or name is None:
        raise ConfigError(
            f"{folder} has no token {OWN[key] if token is None else token} ({key})",
            hint=f"extend it by `add: [image]`, or name the id of a token it has as {key} of the model",
        )
    added = token in inner.get_added_tokens_decoder()
    twice = inner.encode(f"a{name}{name}b", add_special_tokens=False).ids.count(token)
    if not added or twice != 2:
        raise ConfigError(
            f"{folder} does not read {name!r} as its token {token} wherever it is written ({key})",
            hint="name a special token: they are the added_tokens of its tokenizer.json",
        )
    marks = {facts["bos_id"]: "BOS", facts["eos_id"]: "EOS"}
    marks[inner.token_to_id(getattr(inner.model, "unk_token", None) or "")] = "what it does not know"
    if key == "image_token_id" and token in marks:
        raise ConfigError(
            f"{folder} writes its token {token}, {name!r}, for {marks[token]}: it cannot be a picture's",
            hint="name another token as image_token_id of the model",
        )
    return token, name


def name_of(folder: Path, token: int | None) -> str:
    """The name of a picture's token in a model folder; ``<image>`` where it sees none."""
    if token is None or not (folder / FAST).is_file():
        return IMAGE
    return str(Tokenizer.from_file(str(folder / FAST)).id_to_token(token) or IMAGE)
