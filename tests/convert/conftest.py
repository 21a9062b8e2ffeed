"""Model folders for the tests of conversion, made by the stages themselves."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from folders import SIZES, tokenizer_folder

from plait import files
from plait.convert import folders
from plait.models.build import build
from plait.parallel.grid import Grid

torch.set_num_threads(1)


def made(folder, kind, build_it):
    """Run a stage into an empty folder and give it its manifest."""
    folder.mkdir(parents=True)
    facts = build_it(folder)
    files.write_manifest(folder, kind=kind, settings={}, facts=facts)
    return folder


@pytest.fixture(scope="session")
def maker(tmp_path_factory):
    """Makers of a random model, SOLO over it, a whole Megatron model and its shards."""
    root = tmp_path_factory.mktemp("models")
    plain = tokenizer_folder(root / "plain", vision=False)
    vision = tokenizer_folder(root / "vision", vision=True)

    class Maker:
        def hf(self, name="base", **sizes):
            source = {"kind": "init", "tokenizer": "plain", **SIZES, **sizes}
            target = root / f"hf-{name}"
            return (
                target if target.exists() else made(target, "hf_model", lambda f: build(f, source, [plain]))
            )

        def solo(self, name="base", **sizes):
            source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}
            target = root / f"solo-{name}"
            parts = [self.hf(name, **sizes), vision]
            return target if target.exists() else made(target, "hf_model", lambda f: build(f, source, parts))

        def megatron(self, hf):
            target = root / f"{hf.name}-megatron"
            return target if target.exists() else made(target, "megatron", lambda f: folders.convert(hf, f))

        def shards(self, hf, tp, pp):
            target = root / f"{hf.name}-megatron-tp{tp}-pp{pp}"
            cut = lambda f: folders.shard(self.megatron(hf), f, Grid(tp, pp))  # noqa: E731
            return target if target.exists() else made(target, "sharded", cut)

    return Maker()
