"""Small model folders."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from folders import SIZES, tokenizer_folder

from plait import files
from plait.models.build import build

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Tokenizer folders: plain, with chat tokens, with vision tokens."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "plain": tokenizer_folder(root / "plain"),
        "chat": tokenizer_folder(root / "chat", chatml=True),
        "vision": tokenizer_folder(root / "vision", vision=True, chatml=True),
    }


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """Makes a model folder with its manifest, as the stage does."""
    root = tmp_path_factory.mktemp("models")

    def run(source, *parts):
        folder = root / f"model-{len(list(root.iterdir()))}"
        folder.mkdir()
        facts = build(folder, source, parts)
        files.write_manifest(folder, kind="hf_model", settings=source, inputs=parts, facts=facts)
        return folder

    return run


@pytest.fixture(scope="session")
def base(make, tokenizers):
    """A random base model."""
    return make({"kind": "init", "tokenizer": "plain", **SIZES}, tokenizers["plain"])


@pytest.fixture(scope="session")
def solo(make, tokenizers, base):
    """SOLO over the base, with patches of 4 x 4 pixels."""
    return make({"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}, base, tokenizers["vision"])
