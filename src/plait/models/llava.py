"""LLaVA: a language model, a vision tower, and a projector between them.

The folder is a ``LlavaForConditionalGeneration`` of transformers. Only where the projector's inner size is not
the language model's hidden size, which transformers cannot say, does it carry code for that one class.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait import files
from plait.config.model import LlavaModel
from plait.config.paths import local
from plait.errors import CheckpointError, ConfigError
from plait.models.common import EMBEDDINGS, copy_tokenizer, drawn, tokenizer_facts, with_rows
from plait.models.specs import LANGUAGE_MODEL, LLAVA, PROJECTOR, TOWER, Spec
from plait.models.tower import PREPROCESSOR, open_tower, preprocessor_of
from plait.models.weights import (
    FolderTensors,
    Tensors,
    check_shapes,
    config_text,
    fingerprint,
    merkle,
    write_safetensors,
)
from plait.tokens.vocabulary import IMAGE, PADDING

STD = 0.02
WIDE = "modeling_llava_wide.py"
AUTO_MAP = {"AutoModelForImageTextToText": "modeling_llava_wide.LlavaForConditionalGeneration"}
OF_THE_WHOLE = ("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "quantization_config")
"""Keys of a part's config that are said once, for the whole."""

log = logging.getLogger(__name__)


def llava(folder: Path, settings: LlavaModel, base: Path, vision: Path, tokenizer: Path) -> dict[str, Any]:
    """Write the model into an empty folder; the facts of its manifest.

    Args:
        folder: where it goes.
        settings: its entry of ``config: raw_hf``.
        base: a Mistral-, Llama- or Qwen2-shaped model.
        vision: a CLIP or SigLIP tower, or the whole model that it is a part of.
        tokenizer: the base's tokenizer with a token for pictures and one for padding.

    Raises:
        CheckpointError: a part is not what its config says, or does not fit.
        ConfigError: the tokenizer has no such tokens.
    """
    facts = tokenizer_facts(tokenizer)
    copy_tokenizer(tokenizer, folder)
    tokens = _tokens(settings, facts, tokenizer)
    text, language = _language_model(base, settings, facts["vocab_size"])
    tower_config, tower = open_tower(vision)
    config = _config(settings, text, tower_config, tokens)
    spec = Spec.from_config(config, where=str(folder / "config.json"))
    parts = {LANGUAGE_MODEL: language, TOWER: tower, PROJECTOR: _projector(settings, spec, text)}
    whole = Tensors()
    for prefix, tensors in parts.items():
        for name in tensors:
            whole.add((prefix + name,), lambda p=prefix, n=name, t=tensors: {p + n: t[n]})  # type: ignore[misc]
    _write_configs(folder, config, spec, facts, tokens, vision)
    write_safetensors(folder, whole)
    built = FolderTensors(folder)
    check_shapes(built.shapes, spec.shapes, str(folder))
    _check_carried(built, base, tower)
    log.info("%d tensors, %d tokens a picture", len(built), spec.vision.tokens if spec.vision else 0)
    return {"merkle": merkle(built)}


def _tokens(settings: LlavaModel, facts: Mapping[str, Any], tokenizer: Path) -> dict[str, int]:
    """The ids of a picture and of padding: those of the config, or of the tokens that are made for it."""
    found: dict[str, int] = {}
    for key, chosen, name in (
        ("image", settings.image_token_id, IMAGE),
        ("pad", settings.pad_token_id, PADDING),
    ):
        token = facts["image"].get(name) if chosen is None else chosen
        if token is None or token >= facts["vocab_size"]:
            raise ConfigError(
                f"{tokenizer} has no token {name if chosen is None else chosen}",
                hint=f"extend it by `add: [image]`, or name the id in {key}_token_id",
            )
        found[key] = token
    if found["image"] == found["pad"]:
        raise ConfigError(f"the picture and padding have one id, {found['pad']}, in {tokenizer}")
    return found


def _language_model(base: Path, settings: LlavaModel, vocab_size: int) -> tuple[dict[str, Any], Tensors]:
    """The base's config and tensors, untied, with a row for every token.

    A base may have more rows than its tokenizer has tokens; it keeps them.
    """
    config = files.read_json(base / "config.json")
    tied = bool(config.get("tie_word_embeddings"))
    config = {**config, "tie_word_embeddings": False}
    spec = Spec.from_config(config, where=str(base / "config.json"))
    stored = FolderTensors(base)
    embedding, head = EMBEDDINGS
    shapes = dict(stored.shapes)
    if tied:
        shapes[head] = shapes.get(embedding, ())
    check_shapes(shapes, spec.shapes, str(base))
    rows = max(vocab_size, spec.vocab_size)
    std = config.get("initializer_range", STD)
    grown = with_rows(stored, vocab_size=rows, policy=settings.new_rows, std=std, seed=settings.seed)
    if tied:
        grown.add((head,), lambda: {head: grown[embedding].clone()})
    return {**config, "vocab_size": rows}, grown


def _projector(settings: LlavaModel, spec: Spec, text: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The projector of a file, or a drawn one."""
    assert spec.projector is not None
    shapes = spec.projector.shapes
    if settings.projector is None:
        return drawn(shapes, std=text.get("initializer_range", STD), seed=settings.seed)
    return read_named(settings.projector, shapes, "raw_hf.*.projector")


def read_named(file: str, shapes: Mapping[str, tuple[int, ...]], key: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file by the ends of their names.

    Raises:
        CheckpointError: the file is not there, or does not hold exactly these.
    """
    path = local(file)
    if not path.is_file():
        raise CheckpointError(f"{key} names {file}, which is no file")
    try:
        with safe_open(path, framework="pt") as stored:
            found = {
                name: stored.get_tensor(full)
                for full in stored.keys()  # noqa: SIM118 - no mapping
                for name in shapes
                if full == name or full.endswith(f".{name}")
            }
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    check_shapes({name: tuple(tensor.shape) for name, tensor in found.items()}, shapes, str(path))
    return found


def _config(
    settings: LlavaModel, text: Mapping[str, Any], vision: Mapping[str, Any], tokens: Mapping[str, int]
) -> dict[str, Any]:
    inner = settings.projector_hidden_size
    wide = inner is not None and inner != text["hidden_size"]
    drops = settings.drop_class_token and vision["model_type"] == "clip_vision_model"
    dtype = text.get("dtype") or text.get("torch_dtype") or "float32"
    return {
        "architectures": [LLAVA],
        "model_type": "llava",
        **({"auto_map": AUTO_MAP, "projector_hidden_size": inner} if wide else {}),
        "text_config": {key: value for key, value in text.items() if key not in OF_THE_WHOLE},
        "vision_config": {key: value for key, value in vision.items() if key not in OF_THE_WHOLE},
        "image_token_index": tokens["image"],
        "pad_token_id": tokens["pad"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": settings.projector_bias,
        "vision_feature_layer": settings.vision_feature_layer,
        "vision_feature_select_strategy": "default" if drops else "full",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def _write_configs(
    folder: Path,
    config: Mapping[str, Any],
    spec: Spec,
    facts: Mapping[str, Any],
    tokens: Mapping[str, int],
    vision: Path,
) -> None:
    tower = spec.vision
    assert tower is not None
    ids = {"bos_token_id": facts["bos_id"], "eos_token_id": facts["eos_id"], "pad_token_id": tokens["pad"]}
    names = files.read_json(folder / "tokenizer.json")["added_tokens"]
    image = next((token["content"] for token in names if token["id"] == tokens["image"]), IMAGE)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image,
        "patch_size": tower.patch_size,
        "num_additional_image_tokens": int(tower.class_token),
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    generation = {"_from_model_config": False, **ids, "suppress_tokens": [tokens["image"]]}
    written = {
        "config.json": {**config, "image_seq_length": tower.tokens},
        "generation_config.json": generation,
        "processor_config.json": processor,
    }
    for name, values in written.items():
        (folder / name).write_text(config_text(values), encoding="utf-8")
    shutil.copyfile(preprocessor_of(vision), folder / PREPROCESSOR)
    if "auto_map" in config:
        shutil.copyfile(Path(__file__).parent / "remote" / WIDE, folder / WIDE)


def _check_carried(built: FolderTensors, base: Path, tower: Mapping[str, Tensor]) -> None:
    """Every tensor of both parts stands in what was built, bit for bit.

    Raises:
        CheckpointError: one does not; it is named.
    """
    sources: list[tuple[str, Mapping[str, Tensor]]] = [(LANGUAGE_MODEL, FolderTensors(base)), (TOWER, tower)]
    for prefix, tensors in sources:
        for name, tensor in tensors.items():
            if fingerprint(built[prefix + name][: len(tensor)]) != fingerprint(tensor):
                raise CheckpointError(f"{built.folder}: {prefix}{name} is not what its source has")
