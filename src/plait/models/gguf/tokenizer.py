"""The tokenizer of a GGUF file, byte-level BPE, as transformers writes one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError
from plait.models.gguf.header import Header, broken
from plait.tokens import tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Codes of a token's type; the others are SentencePiece's."""
SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
SPLITS = {"gpt-2": False, "smollm": True}
"""How a text is split before it is merged, by the file's name of it: whether each digit stands alone."""


def save(header: Header, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, if there is one.

    Raises:
        CheckpointError: it is of another kind, or its vocabulary is not whole.
    """
    from transformers import PreTrainedTokenizerFast

    names = _vocabulary(header)
    template = header.values.get("tokenizer.chat_template") or None
    if not isinstance(template, str | None):
        raise broken(header.path, "its chat template is no text")
    made = PreTrainedTokenizerFast(
        tokenizer_object=_backend(header, names),
        clean_up_tokenization_spaces=False,
        **{role: _special(header, key, names) for role, key in SPECIAL.items() if key in header.values},
    )
    made.chat_template = template
    tokenizer.save(made, folder)


def _backend(header: Header, names: list[str]) -> Any:
    """What splits and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(header, vocabulary)))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    alone = SPLITS[header.values["tokenizer.ggml.pre"]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytewise]) if alone else bytewise
    backend.decoder = decoders.ByteLevel()
    kinds = header.values["tokenizer.ggml.token_type"]
    backend.add_tokens(
        [
            AddedToken(name, special=kind == CONTROL, normalized=False)
            for name, kind in zip(names, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return backend


def _vocabulary(header: Header) -> list[str]:
    """Every token, by its id."""
    values = header.values
    kind, split = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or str(split) not in SPLITS:
        raise CheckpointError(
            f"{header.path} has a tokenizer of kind {kind!r} whose texts are split as {split!r}",
            hint=f"plait reads kind 'gpt2' split as {' or '.join(map(repr, SPLITS))}",
        )
    names = _texts(header, "tokenizer.ggml.tokens")
    kinds = values.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(names):
        raise broken(header.path, f"its {len(names)} tokens have not a type each")
    odd = set(kinds) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}
    if odd or "" in names or len(set(names)) != len(names):
        why = f"has tokens of type {min(odd)}" if odd else "has an empty token, or one twice"
        raise CheckpointError(f"{header.path} {why}, as no byte-level vocabulary has")
    return names


def _merges(header: Header, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Which two tokens become one, the first first."""
    found = []
    for text in _texts(header, "tokenizer.ggml.merges"):
        left, _, right = text.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise broken(header.path, f"the merge {text!r} is of tokens that are not in its vocabulary")
        found.append((left, right))
    return found


def _texts(header: Header, key: str) -> list[str]:
    found = header.values.get(key)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise broken(header.path, f"it has no list of texts {key}")
    return found


def _special(header: Header, key: str, names: list[str]) -> str:
    number = header.values[key]
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise broken(header.path, f"{key} is {number!r}, and it has {len(names)} tokens")
    return names[number]
