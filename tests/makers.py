"""Model folders for tests, made by the stages themselves."""

import shutil

import torch
from folders import SIZES, tokenizer_folder

from plait import files
from plait.convert import folders
from plait.models.build import build
from plait.models.common import copy_tokenizer
from plait.parallel.grid import Grid

torch.set_num_threads(1)


def made(folder, kind, build_it):
    """Run a stage into an empty folder and give it its manifest."""
    folder.mkdir(parents=True)
    facts = build_it(folder)
    files.write_manifest(folder, kind=kind, settings={}, facts=facts)
    return folder


def shaken(folder, facts):
    """Give every norm and bias values of its own: one in the place of another then shows."""
    from safetensors.torch import load_file, save_file

    from plait.models.weights import FolderTensors, write_down

    draw = torch.Generator().manual_seed(7)
    weights = load_file(folder / "model.safetensors")
    for name in sorted(weights):
        if weights[name].dim() == 1:
            weights[name] += 0.1 * torch.randn(weights[name].shape, generator=draw)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {**facts, **write_down(FolderTensors(folder))}


def written(folder, kind, tokenizer, **sizes):
    """A language model of transformers' own class, its norms and biases drawn; the facts of its manifest."""
    import transformers

    torch.manual_seed(3)
    tied = sizes.pop("tied")
    sizes = {"vocab_size": 259, **sizes}
    config = getattr(transformers, f"{kind}Config")(
        bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=tied, **sizes
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return shaken(folder, {})


def tied_again(untied, folder):
    """Save an untied LLaVA of one matrix at both ends as a tied one; the facts of its manifest."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from plait.models.weights import FolderTensors, write_down

    shutil.copytree(untied, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    AutoModelForImageTextToText.from_pretrained(folder, config=config).save_pretrained(folder)
    return write_down(FolderTensors(folder))


TOWER = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
         "image_size": 30, "patch_size": 8}  # fmt: skip


class Maker:
    """Makers of a random model, SOLO over it, a whole Megatron model and its shards."""

    def __init__(self, root):
        self.root = root
        self.plain = tokenizer_folder(root / "plain", vision=False)
        self.vision = tokenizer_folder(root / "vision", vision=True)
        self.image = tokenizer_folder(root / "image", vision=False, image=True)

    def hf(self, name="base", **sizes):
        source = {"kind": "init", "tokenizer": "plain", **SIZES, **sizes}
        return self._once(f"hf-{name}", "hf_model", lambda f: build(f, source, [self.plain]))

    def mixtral(self, name="base", **sizes):
        source = {"kind": "init_mixtral", "tokenizer": "plain", "num_local_experts": 4, **SIZES, **sizes}
        return self._once(f"mixtral-{name}", "hf_model", lambda f: build(f, source, [self.plain]))

    def solo(self, name="base", **sizes):
        source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}
        parts = [self.hf(name, **sizes), self.vision]
        return self._once(f"solo-{name}", "hf_model", lambda f: build(f, source, parts))

    def tower(self, name="clip", *, shake=False, **sizes):
        source = {"kind": "init_tower", "architecture": name.split("-")[0], **TOWER, **sizes}
        finish = shaken if shake else lambda _, facts: facts
        return self._once(f"tower-{name}", "hf_model", lambda f: finish(f, build(f, source, [])))

    def llava(self, name="base", *, tower=None, base=None, **keys):
        """A LLaVA folder with every bias and norm drawn, so that a misplaced one shows."""
        source = {"kind": "llava", "base": "b", "vision": "v", "tokenizer": "t", **keys}
        parts = [base or self.hf(), tower or self.tower(), self.image]
        return self._once(f"llava-{name}", "hf_model", lambda f: shaken(f, build(f, source, parts)))

    def tied_llava(self, kind="Qwen2", *, name="", **sizes):
        """A LLaVA over a tied ``kind``, saved by transformers as it saves one: without an output layer."""
        base = self.foreign(kind, tied=True, name=f"-seeing{name}", **{"initializer_range": 0.1, **sizes})
        untied = self.llava(f"{kind}-untied{name}", base=base)
        return self._once(f"llava-{kind}-tied{name}", "hf_model", lambda f: tied_again(untied, f))

    def foreign(self, kind, *, tied=False, name="", **sizes):
        """A random language model as transformers writes it: ``kind`` is Llama, Mistral or Qwen2."""
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim"} | sizes
        name = f"hf-{kind}{'-tied' * tied}{name}"
        return self._once(name, "hf_model", lambda f: written(f, kind, self.plain, tied=tied, **sizes))

    def megatron(self, hf):
        return self._once(f"{hf.name}-megatron", "megatron", lambda f: folders.convert(hf, f))

    def shards(self, hf, tp, pp, **uneven):
        grid = Grid(tp, pp, **uneven)
        name = "-".join(f"{key}{size}" for key, size in grid.facts.items())
        return self._once(f"{hf.name}-{name}", "sharded", lambda f: folders.shard(self.megatron(hf), f, grid))

    def _once(self, name, kind, build_it):
        target = self.root / name
        return target if target.exists() else made(target, kind, build_it)


def rank_of(folder, grid):
    """A rank's model with the weights that a sharded folder has for it."""
    from megatron.core import parallel_state as ps

    from plait.convert import checkpoint
    from plait.models.specs import Spec
    from plait.train.build import build_model, load_weights

    model = build_model(Spec.of(folder, "hf_config.json"), grid, dtype=torch.float32)
    place = ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank()
    load_weights(model, checkpoint.read_rank(folder, grid, *place))
    return model


def save(folder, grid, target):
    """Save a sharded folder's model as Megatron Core's trainer does; every rank calls it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    state = {**rank_of(folder, grid).sharded_state_dict(), "iteration": 7}
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(target), strategy)
