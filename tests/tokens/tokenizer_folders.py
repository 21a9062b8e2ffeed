"""Tokenizers of the default plan, made without the command line, and a byte-level one with merges."""

import json
from pathlib import Path

from plait import files
from plait.tokens import tokenizer

PACKAGE = {"kind": "package", "package": "mistral_common", "file": "data/tokenizer.model.v1"}
ADDED = {"solo": ["vision", "locations", "chatml"], "chatml": ["chatml"]}


def make(folder: Path, source: dict, base: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    facts = tokenizer.build(folder, source, base)
    inputs = [] if base is None else [base]
    files.write_manifest(folder, kind="tokenizer", settings={"source": source}, inputs=inputs, facts=facts)
    return folder


def tekken(folder: Path) -> Path:
    """The words and the pattern of Mistral's tekken, of mistral_common, as a Hugging Face tokenizer."""
    import mistral_common
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    found = json.loads(data.read_text())
    size = found["config"]["default_vocab_size"] - found["config"]["default_num_special_tokens"]
    folder.mkdir()
    ranks = folder / "words.tiktoken"
    ranks.write_text("".join(f"{one['token_bytes']} {one['rank']}\n" for one in found["vocab"][:size]))
    inner = TikTokenConverter(str(ranks), pattern=found["config"]["pattern"]).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    ranks.unlink()
    ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
    facts = {"vocab_size": len(tokenizer), **ids, "vision": {}, "chatml": {}}
    files.write_manifest(folder, kind="tokenizer", settings={}, facts=facts)
    return folder
