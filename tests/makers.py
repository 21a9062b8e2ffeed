"""Model folders for tests, made by the stages themselves."""

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


class Maker:
    """Makers of a random model, SOLO over it, a whole Megatron model and its shards."""

    def __init__(self, root):
        self.root = root
        self.plain = tokenizer_folder(root / "plain", vision=False)
        self.vision = tokenizer_folder(root / "vision", vision=True)

    def hf(self, name="base", **sizes):
        source = {"kind": "init", "tokenizer": "plain", **SIZES, **sizes}
        return self._once(f"hf-{name}", "hf_model", lambda f: build(f, source, [self.plain]))

    def solo(self, name="base", **sizes):
        source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}
        parts = [self.hf(name, **sizes), self.vision]
        return self._once(f"solo-{name}", "hf_model", lambda f: build(f, source, parts))

    def megatron(self, hf):
        return self._once(f"{hf.name}-megatron", "megatron", lambda f: folders.convert(hf, f))

    def shards(self, hf, tp, pp):
        cut = lambda f: folders.shard(self.megatron(hf), f, Grid(tp, pp))  # noqa: E731
        return self._once(f"{hf.name}-megatron-tp{tp}-pp{pp}", "sharded", cut)

    def _once(self, name, kind, build_it):
        target = self.root / name
        return target if target.exists() else made(target, kind, build_it)
