"""LLaVA: a language model, a vision tower, and a projector between them.

The folder is a ``LlavaForConditionalGeneration`` of transformers. Only where the projector's inner size is
not the language model's hidden size, which transformers cannot say, does it carry code for that one class.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from plait import files
from plait.config.model import LlavaModel
from plait.errors import CheckpointError, ConfigError
from plait.layout import FAST
from plait.models.common import (
    EMBEDDINGS,
    check_carried,
    copy_tokenizer,
    drawn,
    open_base,
    read_named,
    tokenizer_facts,
    with_rows,
)
from plait.models.specs import LANGUAGE_MODEL, LLAVA, PROJECTOR, TEXT_ARCHITECTURES, TOWER, Spec
from plait.models.tower import PREPROCESSOR, PROCESSOR, open_tower, preprocessor_of
from plait.models.weights import (
    FolderTensors,
    Tensors,
    check_shapes,
    config_text,
    write_down,
    write_safetensors,
)
from plait.tokens.pictures import OWN, special
from plait.tokens.tokenizer import CONFIG, check_fast

STD = 0.02
WIDE = "modeling_llava_wide.py"
AUTO_MAP = {"AutoModelForImageTextToText": "modeling_llava_wide.LlavaForConditionalGeneration"}
OF_THE_WHOLE = (
    "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "tie_word_embeddings",
    "_name_or_path",
)  # fmt: skip
"""Keys of a part's config that are said once, for the whole."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


def llava(folder: Path, settings: LlavaModel, *, base: Path, vision: Path, tokenizer: Path) -> dict[str, Any]:
    """Write the model into an empty folder; the facts of its manifest.

    Args:
        folder: where it goes.
        settings: its entry of ``config: raw_hf``.
        base: a Mistral, Llama, Qwen2 or Qwen3 model.
        vision: a CLIP or SigLIP tower, or the whole model that it is a part of.
        tokenizer: the base's tokenizer with a token for pictures and one for padding, of any names.

    Raises:
        CheckpointError: a part is not what its config says, or does not fit.
        ConfigError: the tokenizer has no such tokens.
    """
    facts = tokenizer_facts(tokenizer)
    tokens = _tokens(settings, facts, tokenizer)
    _check_extends(base, tokenizer)
    text, stored, language = _language_model(base, settings, facts)
    tower = open_tower(vision)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    config = config_of(settings, text, tower.config, tokens)
    spec = Spec.from_config(config, where=str(folder / "config.json"))
    copy_tokenizer(tokenizer, folder)
    _write_configs(folder, config, spec, tokens)
    (folder / PREPROCESSOR).write_text(preprocessor_of(vision, tower.tower), encoding="utf-8")
    projector = _projector(settings, spec, text, dtype=dtype or stored[EMBEDDINGS[0]].dtype)
    parts = {LANGUAGE_MODEL: language, TOWER: tower.tensors, PROJECTOR: projector}
    write_safetensors(folder, _joined({name: cast(part, dtype) for name, part in parts.items()}))
    built = FolderTensors(folder)
    check_shapes(built.shapes, spec.shapes, str(folder))
    carried = check_carried(cast(stored, dtype), built, prefix=LANGUAGE_MODEL)
    carried += check_carried(cast(tower.tensors, dtype), built, prefix=TOWER)
    rows = (stored.shapes[EMBEDDINGS[0]][0], spec.vocab_size)
    log.info("%d tensors carried, %d -> %d token rows%s%s", carried, *rows, stored.note, tower.note)
    _log_mixed(built)
    return write_down(built)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """The tensors in one type, each cast when it is asked for; None leaves each its own."""
    if dtype is None:
        return tensors
    whole = Tensors()
    for name in tensors:
        whole.add((name,), lambda name=name: {name: tensors[name].to(dtype)})  # type: ignore[misc]
    return whole


def _log_mixed(built: FolderTensors) -> None:
    """Say in a line where parts are of several types."""
    types: dict[str, set[str]] = {}
    for name, tensor in built.items():
        types.setdefault(name.partition(".")[0], set()).add(str(tensor.dtype).removeprefix("torch."))
    if len(set().union(*types.values())) > 1:
        said = ", ".join(f"{part} {' and '.join(sorted(found))}" for part, found in types.items())
        log.info("parts are of several types: %s; `dtype` of raw_hf casts all to one", said)


def _joined(parts: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """The parts' tensors, with the part's name before each of theirs."""
    whole = Tensors()
    for prefix, tensors in parts.items():
        for name in tensors:
            whole.add((prefix + name,), lambda p=prefix, n=name, t=tensors: {p + n: t[n]})  # type: ignore[misc]
    return whole


def _tokens(settings: LlavaModel, facts: Mapping[str, Any], tokenizer: Path) -> dict[str, tuple[int, str]]:
    """The ids and names of a picture and of padding: those of the config, or of the tokens made for it.

    Raises:
        ConfigError: the tokenizer lacks one, never gives it, or has but one for both.
    """
    found: dict[str, tuple[int, str]] = {
        key: special(tokenizer, facts, key, getattr(settings, key)) for key in OWN
    }
    if found["image_token_id"] == found["pad_token_id"]:
        raise ConfigError(
            f"the picture and padding are one token, {found['pad_token_id'][0]}, in {tokenizer}"
        )
    return found


def _check_extends(base: Path, tokenizer: Path) -> None:
    """A base's rows are its own tokens': each must have the same id in the tokenizer.

    Raises:
        CheckpointError: one has another; it is named.
    """
    if not (base / FAST).is_file():
        return
    check_fast(base / FAST)
    own = tokenizers.Tokenizer.from_file(str(base / FAST)).get_vocab()
    given = tokenizers.Tokenizer.from_file(str(tokenizer / FAST)).get_vocab()
    for name, token in sorted(own.items(), key=lambda item: item[1]):
        if given.get(name) != token:
            raise CheckpointError(
                f"{name!r} is token {token} of {base} and {given.get(name, 'no token')} of {tokenizer}",
                hint="give the tokenizer that extends the base's own",
            )


def _language_model(
    base: Path, settings: LlavaModel, facts: Mapping[str, Any]
) -> tuple[dict[str, Any], FolderTensors, Tensors]:
    """The base's config, its tensors, and these untied with a row for every token.

    A base may have more rows than its tokenizer has tokens; it keeps them.
    """
    config, stored = open_base(base, known=tuple(TEXT_ARCHITECTURES.values()))
    rows = max(facts["vocab_size"], config["vocab_size"])
    std = config.get("initializer_range", STD)
    grown = with_rows(stored, vocab_size=rows, policy=settings.new_rows, std=std, seed=settings.seed)
    embedding, head = EMBEDDINGS
    if config.get("tie_word_embeddings"):
        grown.add((head,), lambda: {head: grown[embedding].clone()})
    ids = {"bos_token_id": facts["bos_id"], "eos_token_id": facts["eos_id"]}
    return {**config, **ids, "vocab_size": rows}, stored, grown


def _projector(
    settings: LlavaModel, spec: Spec, text: Mapping[str, Any], *, dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """The projector of a file, or a drawn one of the language model's type."""
    assert spec.projector is not None
    shapes = spec.projector.shapes
    if settings.projector is not None:
        return read_named(settings.projector, shapes, key="raw_hf.*.projector")
    std = settings.initializer_range or text.get("initializer_range", STD)
    made = drawn(shapes, std=std, seed=settings.seed)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def config_of(
    settings: LlavaModel,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    tokens: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """The config.json of the model.

    Args:
        settings: its entry of ``config: raw_hf``.
        text: the language model's config.json, with the rows that it will have.
        vision: the tower's.
        tokens: id and name of ``image_token_id`` and ``pad_token_id``.
    """
    inner = settings.projector_hidden_size
    wide = inner is not None and inner != text["hidden_size"]
    drops = settings.drop_class_token and vision["model_type"] == "clip_vision_model"
    return {
        "architectures": [LLAVA],
        "model_type": "llava",
        **({"auto_map": AUTO_MAP, "projector_hidden_size": inner} if wide else {}),
        "text_config": {key: value for key, value in text.items() if key not in OF_THE_WHOLE},
        "vision_config": {key: value for key, value in vision.items() if key not in OF_THE_WHOLE},
        "image_token_index": tokens["image_token_id"][0],
        "pad_token_id": tokens["pad_token_id"][0],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": settings.projector_bias,
        "vision_feature_layer": settings.vision_feature_layer,
        "vision_feature_select_strategy": "default" if drops else "full",
        "tie_word_embeddings": False,
        "dtype": str(DTYPES[settings.dtype]).removeprefix("torch.")
        if settings.dtype
        else text.get("dtype") or text.get("torch_dtype") or "float32",
    }


def _write_configs(
    folder: Path, config: Mapping[str, Any], spec: Spec, tokens: Mapping[str, tuple[int, str]]
) -> None:
    """Write the configs of model, generation, processor and tokenizer; a picture is never generated."""
    assert spec.vision is not None
    image, image_name = tokens["image_token_id"]
    pad, pad_name = tokens["pad_token_id"]
    text = config["text_config"]
    ids = {key: text[key] for key in ("bos_token_id", "eos_token_id")}
    written = {
        "config.json": {**config, "image_seq_length": spec.vision.tokens},
        "generation_config.json": {
            "_from_model_config": False,
            **ids,
            "pad_token_id": pad,
            "suppress_tokens": [image],
        },
        PROCESSOR: {
            "processor_class": "LlavaProcessor",
            "image_token": image_name,
            "patch_size": spec.vision.patch_size,
            "num_additional_image_tokens": int(spec.vision.class_token),
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        },
        # Answers of a batch start together only where padding stands before the prompts.
        CONFIG: {
            **_of_picture(files.read_object(folder / CONFIG), image_name),
            "pad_token": pad_name,
            "padding_side": "left",
        },
    }
    for name, values in written.items():
        (folder / name).write_text(config_text(values), encoding="utf-8")
    if "auto_map" in config:
        shutil.copyfile(Path(__file__).parent / "remote" / WIDE, folder / WIDE)


def _of_picture(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tokenizer's config; one that has a name for pictures itself goes before the processor's."""
    return {
        key: _of_picture(value, name) if isinstance(value, Mapping) else value
        for key, value in config.items()
    } | ({"image_token": name} if "image_token" in config else {})
