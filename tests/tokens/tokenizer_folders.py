"""Tokenizers of the default plan, made without the command line."""

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
