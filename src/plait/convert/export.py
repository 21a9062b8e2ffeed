"""A trained checkpoint as a complete Hugging Face folder."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from plait import files
from plait.convert.carried import CARD, copy_beside
from plait.convert.forms import coverage
from plait.convert.layouts import lay_out_hf, trained
from plait.errors import CheckpointError
from plait.layout import FAST, HF_CONFIG
from plait.models.leaves import write_leaves
from plait.models.specs import LLAVA, SOLO, Spec
from plait.models.weights import config_text
from plait.tokens.vocabulary import PICTURE, TURN_END

TEMPLATE = "chat_template.jinja"

log = logging.getLogger(__name__)


def export_folder(
    hf_source: Path, iteration: Path, folder: Path, *, recipe: str, chat_template: str | None
) -> dict[str, Any]:
    """Write a trained model into an empty folder, with all that its source has but the weights.

    Args:
        hf_source: the Hugging Face folder that the run's model was made from.
        iteration: a training checkpoint.
        folder: where the model goes.
        recipe: what it was trained as; the model card says it.
        chat_template: the Jinja text of the run's template; None leaves the tokenizer's own.

    Returns:
        ``merkle``, of the weights as they passed, and ``coverage``.

    Raises:
        CheckpointError: the source is not the model that was trained, or the checkpoint lacks a part of it.
    """
    _check_source(hf_source, iteration)
    spec = Spec.of(iteration, HF_CONFIG)
    model = trained(iteration, spec)
    copy_beside(hf_source, folder)
    leaves = model.stream(lay_out_hf(folder, spec, model.dtypes))
    set_dtype(folder, model.dtypes[spec.norm])
    if chat_template is not None:
        _set_template(folder, chat_template)
    (folder / CARD).write_text(
        _card(folder, spec, iteration.name, recipe=recipe, template=chat_template or ""), encoding="utf-8"
    )
    log.info("%d tensors -> %s", len(leaves), folder.name.lstrip(".").split(".")[0])
    return {"merkle": write_leaves(folder, leaves), "coverage": coverage(spec)}


def _check_source(hf_source: Path, iteration: Path) -> None:
    if (hf_source / "config.json").read_bytes() != (iteration / HF_CONFIG).read_bytes():
        raise CheckpointError(
            f"{hf_source} is not what {iteration} was trained from: their config.json differ",
            hint="give the raw_hf folder that the run's model names as its source",
        )


def set_dtype(folder: Path, dtype: str) -> None:
    """Say the type of the trained weights, where it is not the source's."""
    config = files.read_object(folder / "config.json")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != dtype:
        _write(folder / "config.json", {**config, key: dtype})


def _set_template(folder: Path, template: str) -> None:
    """Give the tokenizer the template of training; a turn's end then also ends generation."""
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    config = files.read_object(folder / "tokenizer_config.json")
    if config.pop("chat_template", None) is not None:
        _write(folder / "tokenizer_config.json", config)
    if TURN_END not in template:
        return
    end = Tokenizer.from_file(str(folder / FAST)).token_to_id(TURN_END)
    generation = files.read_object(folder / "generation_config.json")
    known = generation.get("eos_token_id")
    ends = [*(known if isinstance(known, list) else [known]), end]
    generation["eos_token_id"] = sorted({one for one in ends if one is not None})
    _write(folder / "generation_config.json", generation)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(config_text(values), encoding="utf-8")


def _card(folder: Path, spec: Spec, iteration: str, *, recipe: str, template: str) -> str:
    """The model card: what the model is and how to load it, without dates or paths."""
    step = int(iteration.removeprefix("iter_"))
    sees = spec.vision is not None or spec.architecture == SOLO
    return _CARD.format(
        recipe=recipe,
        step=step,
        architecture=spec.architecture,
        layers=spec.num_layers,
        hidden=spec.hidden_size,
        heads=spec.num_attention_heads,
        groups=spec.num_key_value_heads,
        vocabulary=spec.vocab_size,
        task="image-text-to-text" if sees else "text-generation",
        load=_load(folder, spec, template),
    )


def _load(folder: Path, spec: Spec, template: str) -> str:
    """How the model is loaded and asked; a folder that carries code for its class says so by auto_map."""
    if spec.architecture == SOLO:
        return _SOLO_CHAT if PICTURE in template else _SOLO
    if spec.architecture != LLAVA:
        return _CHAT
    trust = ", trust_remote_code=True" if "auto_map" in files.read_object(folder / "config.json") else ""
    return _LLAVA.format(trust=trust)


_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [plait, megatron-core]
---

# {architecture}, trained by the recipe `{recipe}`, iteration {step}

| layers | hidden size | heads | key-value heads | vocabulary |
| --- | --- | --- | --- | --- |
| {layers} | {hidden} | {heads} | {groups} | {vocabulary} |

Made by plait from a Megatron Core checkpoint. `plait.json` has the digests of all files, the Merkle
root of the weights and the settings that made them.

```python
{load}```
"""

_CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
chat = [{"role": "user", "content": "Hello!"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""

_SOLO = """\
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
inputs = processor(images=Image.open("picture.png"), text="")
print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""

_SOLO_CHAT = """\
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
inputs = processor(images=Image.open("picture.png"), text=prompt)
print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""

_LLAVA = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(".")
model = AutoModelForImageTextToText.from_pretrained("."{trust})
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "\\n"}}]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
picture = Image.open("picture.png")
inputs = processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""
