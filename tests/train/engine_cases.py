"""What models are by the layers of the stand-in, beside Megatron Core's own: see ``engine_stand_in``."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from megatron.core.transformer.enums import AttnMaskType
from saving import save_tensors

from plait.config.run import Run, attends_by_documents
from plait.convert import checkpoint, engine, stream, torch_dist
from plait.convert.tables import carried, engine_name
from plait.convert.torch_dist import EXTRA
from plait.models.common import drawn
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train import build, node, state
from plait.train.batches import masked_out, positions
from plait.train.world import world

DENSE = {
    "architectures": ["MistralForCausalLM"], "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = DENSE | {
    "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 59, "vision_feature_layer": -2,
    "text_config": DENSE | {"model_type": "mistral"},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip
RUN = {
    "recipe": "chat", "model": "m", "mixture": "x", "train_iters": 10, "save_interval": 10,
    "micro_batch_size": 2,
}  # fmt: skip
ENDS = dict.fromkeys(f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
ENGINE = {"transformer_impl": "transformer_engine"}
AGAIN = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {
    "documents": (DENSE, {}),
    "documents in a window": (DENSE | {"sliding_window": 4}, {}),
    "documents, layers again": (DENSE, AGAIN),
    "documents, attention again": (DENSE, {"recompute_granularity": "selective"}),
    "a mask": (DENSE, {"attention_backend": "unfused"}),
    "a mask with a window": (DENSE | {"sliding_window": 4}, {"attention_backend": "unfused"}),
    "a mask, fp32": (DENSE, {"params_dtype": "fp32"}),
    "a picture model": (LLAVA, {}),
    "experts": (EXPERTS, {}),
    "experts as one": (EXPERTS, {"moe_grouped_gemm": True}),
}
"""A model and keys of its run beside :data:`ENGINE`. The run says bf16 where it says nothing: all is fp32."""
GO_ON = ("documents", "experts", "experts as one")
DOCUMENTS = np.array([[0] * 7 + [1] + [2] * 9 + [-1] * 7, [0] * 3 + [1] * 21])


def settings(**keys):
    return Run(**RUN, **keys).model_dump(mode="json") | ENDS


def built(model, run):
    """The model by the layers that a run says, with drawn weights."""
    for backend in ("FLASH", "FUSED", "UNFUSED"):  # Megatron sets them for one model a process
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    spec = Spec.from_config(model)
    chunks = build.build_chunks(spec, Grid(), dtype=torch.float32, run=run)
    whole = engine.to_mcore(drawn(spec.shapes, std=0.2, seed=3), spec)
    build.load_cut(chunks, whole, spec, Grid())
    return chunks, spec


def computed(chunks, spec, run):
    """Losses [B, S] of two sequences of documents, and the gradients of their sum, by name."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, spec.vocab_size, DOCUMENTS.shape))
    mask = masked_out(torch.from_numpy(DOCUMENTS), spec.sliding_window)
    given = None if attends_by_documents(run) else mask
    losses = chunks[0](ids, torch.from_numpy(positions(DOCUMENTS)), given, labels=ids.roll(-1, 1))
    losses.sum().backward()
    return losses.detach(), {name: one.grad for name, one in chunks[0].named_parameters()}


def layers(chunks):
    """The class of each part of a layer, and the norm after all."""
    decoder = getattr(chunks[0], "language_model", chunks[0]).decoder
    parts = {name: type(one).__name__ for name, one in decoder.layers[0].named_modules() if name}
    return parts | {"final_layernorm": type(decoder.final_layernorm).__name__}


def compared(model, keys, folder):
    """How far the two ways are apart, and what passes between them by way of checkpoints."""
    run = settings(**ENGINE, **keys)
    local, spec = built(model, settings())
    fused, _ = built(model, run)
    (ours, own), (theirs, other) = computed(local, spec, settings()), computed(fused, spec, run)
    names = {name if name in other else engine_name(name): name for name in own}
    assert sorted(names) == sorted(other)
    apart = max(float((other[n] - own[names[n]]).abs().max()) for n in names)
    return {
        "losses": float((ours - theirs).abs().max()),
        "gradients": apart / max(float(one.abs().max()) for one in own.values()),
        "layers": layers(fused),
        "saved": sorted(set(stored(local)) ^ set(stored(fused))),
        "filed": filed(fused, spec, "te-grouped" if "moe_grouped_gemm" in keys else "te", folder / "classic"),
        "refused": refused(fused),
        "passed": {
            **passed(local, fused, spec, folder / "own"),
            **passed(fused, local, spec, folder / "fused"),
        },
    }


def filed(chunks, spec, layers, folder):
    """Names and shapes that a classic file has otherwise than the model; its tower is Megatron Core's own."""
    checkpoint.lay_out(folder, spec, Grid(), dict.fromkeys(spec.shapes, "float32"), layers=layers)
    content = torch.load(checkpoint.rank_file(folder, Grid(), 0, 0), weights_only=False)
    states = (content["model"], chunks[0].state_dict())
    ours, theirs = (
        {(name, tuple(one.shape)) for name, one in state.items() if EXTRA not in name} for state in states
    )
    return sorted(name for name, _ in ours ^ theirs if not name.startswith("vision_model."))


def refused(chunks):
    """What attention by documents does not take for them."""
    core = getattr(chunks[0], "language_model", chunks[0]).decoder.layers[0].self_attention.core_attention
    part, said = torch.zeros(4, 1, 2, 8), []
    for name, mask in (("a mask", torch.zeros(1, 1, 4, 4, dtype=torch.bool)), ("nothing", None)):
        try:
            core(part, part, part, mask, attn_mask_type=AttnMaskType.padding_causal)
        except ValueError:
            said.append(name)
        except AssertionError:
            pass  # the stand-in's own
    return said


def stored(chunks):
    """Names and shapes of tensors in a checkpoint."""
    found = [one for name, one in state.tensors(chunks).items() if EXTRA not in name]
    return [f"{one.key} {getattr(one, 'global_shape', '')}" for one in found]


def passed(one, other, spec, folder):
    """Whether what one has saved is, bit for bit, what the other has loaded, and what is read of it."""
    folder.mkdir()
    with torch.no_grad():
        for parameter in one[0].parameters():
            parameter.mul_(1.5)  # rows of no token stay zeros
    save_tensors(state.tensors(one), folder)
    state.load_model(other, folder)
    shapes = {name: shape for name, shape in spec.shapes.items() if name not in carried(spec)}
    view = stream.View(stream.Model(torch_dist.sources(folder, spec), shapes))
    read = engine.cut(engine.to_mcore(view, spec), spec, Grid(), 0, 0)
    saved, loaded = (dict(chunks[0].named_parameters()) for chunks in (one, other))
    triples = [(tensor, of(saved, name), of(loaded, name)) for name, tensor in read.items()]
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in triples)
    return {folder.name: same and len(triples) == len(saved) == len(loaded)}


class Trained:
    """A run of some steps, as training builds it."""

    def __init__(self, model, run):
        chunks, self.spec = built(model, run)
        self.run, self.model = run, build.wrap(chunks, run)
        optimizer = build.optimizer_of(self.model, run)
        schedule = build.schedule_of(optimizer, run, train_iters=10, sequence=DOCUMENTS.shape[1])
        self.state = state.TrainState(chunks, optimizer, schedule)

    def step(self):
        """The losses before it; an optimizer's step that follows every gradient."""
        self.model[0].zero_grad_buffer()
        self.state.optimizer.zero_grad()
        losses, _ = computed(self.model, self.spec, self.run)
        self.model[0].finish_grad_sync()
        self.state.optimizer.step()
        self.state.schedule.step(self.run["global_batch_size"])
        self.state.iteration += 1
        return losses


def goes_on(model, keys, folder):
    """How far losses are apart where one of the layers goes on from a checkpoint of the other."""
    runs = settings(lr=1e-2), settings(lr=1e-2, **ENGINE, **keys)
    apart = []
    for number, (first, then) in enumerate((runs, runs[::-1])):
        place = folder / f"goes on {number}"
        place.mkdir()
        one, other = Trained(model, first), Trained(model, then)
        one.step()
        save_tensors(one.state.sharded(is_loading=False), place)
        other.state.load(place)
        pairs = [(one.step(), other.step()) for _ in range(3)]
        apart += [float((a - b).abs().max()) for a, b in pairs]
        assert other.state.iteration == 4
        assert float((pairs[0][0] - pairs[-1][0]).abs().max()) > 0.1
    return max(apart)


def of(parameters, name):
    return parameters[name if name in parameters else engine_name(name)]


def cases():
    os.environ |= node.DETERMINISTIC
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(world(tp=1, pp=1, seed=0, rendezvous=f"file://{folder}/store"))
        found = {}
        for name, (model, keys) in CASES.items():
            place = folder / name
            place.mkdir()
            found[name] = compared(model, keys, place)
            if name in GO_ON:
                found[name]["goes on"] = goes_on(model, keys, place)
        return found
