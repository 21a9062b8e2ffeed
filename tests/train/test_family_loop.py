"""Tied embeddings, scaled angles and norms of heads are trained as a plain PyTorch loop trains them."""

import importlib
import json

import numpy as np
import pytest
import torch
import transformers
from test_loop import AROUND, RUN, STEPS, feed, plainly, train_rank
from test_resume import segment
from ties import stage_of

from plait import files
from plait.convert import engine
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

LONG = pytest.mark.long
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "attn_implementation": "eager",
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": True, "rope_parameters": SCALED}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 12}),
    "qwen3, untied": ("Qwen3", {"head_dim": 12}),
}
DEEP = {"llama, deep": ("Llama", {**FAMILIES["llama"][1], "num_hidden_layers": 4})}
SHARED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
WAYS = {
    "one process": (Grid(), 1, {}),
    "tensors": (Grid(2, 1), 1, {}),
    "stages": (Grid(1, 2), 1, {}),
    "both": (Grid(2, 2), 1, {}),
    "copies": (Grid(), 2, SHARED),
    "stages of copies": (Grid(1, 2), 2, SHARED),
    "sequences": (Grid(2, 1), 1, {"sequence_parallel": True}),
}
SHORT = {("qwen3", "tensors"), ("llama", "stages"), ("qwen3", "sequences")}
CASES = [
    pytest.param(name, way, marks=() if (name, way) in SHORT else LONG) for name in FAMILIES for way in WAYS
]


@pytest.fixture(scope="module")
def models():
    """Models by family, each with what the plain loop made of it."""
    made = {}

    def make(name):
        if name not in made:
            kind, sizes = (FAMILIES | DEEP)[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**SIZES | sizes)
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            made[name] = model, plainly(model)
        return made[name]

    return make


def told(model):
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


@pytest.mark.parametrize(("name", "way"), CASES)
def test_losses_norms_and_weights_are_those_of_a_plain_loop(name, way, models, tmp_path):
    model, (losses, norms, end) = models(name)
    grid, copies, keys = WAYS[way]
    arguments = model.state_dict(), told(model), grid, tmp_path, torch.float32

    ranks = run_ranks(with_keys, grid, arguments, keys, copies=copies)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-5, rtol=0)
    assert np.allclose([row["grad norm"] for row in rows], norms, atol=1e-5, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.3
    spec = Spec.from_config(told(model))
    states = {place: {n: torch.from_numpy(w) for n, w in state.items()} for place, state in ranks}
    back = engine.to_hf(engine.join(states, spec, grid), spec)
    assert max((tensor - end[name]).abs().max().item() for name, tensor in back.items()) < 1e-4
    if spec.tied and grid.pp > 1:
        for tp in range(grid.tp):
            first, last = states[tp, 0], states[tp, grid.pp - 1]
            assert torch.equal(first["embedding.word_embeddings.weight"], last["output_layer.weight"])


def with_keys(arguments, keys):
    return train_rank(*arguments, **keys)


def chunked_rank(weights, config, path):
    """A tied model in an interleaved pipeline of two stages of two chunks; its tied tensors at the end."""
    from megatron.core import parallel_state as ps

    from plait.train.build import build_chunks, load_weights, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.state import TrainState

    run = {**RUN, "virtual_pipeline_model_parallel_size": 2}
    spec, grid = Spec.from_config(config), Grid(1, 2)
    chunks = build_chunks(spec, grid, dtype=torch.float32, run=run)
    for number, chunk in enumerate(chunks):
        place = number * grid.pp + ps.get_pipeline_model_parallel_rank()
        load_weights(chunk, stage_of(weights, spec, grid.interleaved(2), 0, place))
    model = wrap(chunks, run)
    optimizer = optimizer_of(model, run)
    state = TrainState(chunks, optimizer, schedule_of(optimizer, run, train_iters=STEPS, sequence=24))
    Trainer(model, state, feed(0, 1), run, AROUND).train(STEPS, folder=path)
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    found = {name: tensor for chunk in chunks for name, tensor in chunk.state_dict().items()}
    return {name: found[name].numpy() for name in ends if name in found}


def test_an_interleaved_pipeline_keeps_both_uses_equal(models, tmp_path):
    model, (losses, norms, _) = models("llama, deep")
    ranks = run_ranks(chunked_rank, Grid(1, 2), model.state_dict(), told(model), tmp_path, chunks=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-5, rtol=0)
    assert np.allclose([row["grad norm"] for row in rows], norms, atol=1e-5, rtol=1e-5)
    (first,), (last,) = (found.values() for found in ranks)
    assert (first == last).all()


def test_a_copy_that_is_not_summed_up_would_show(models, monkeypatch, tmp_path):
    """The gradients of both uses are one sum: without it the losses part."""
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    monkeypatch.setattr(finalize, "_allreduce_word_embedding_grads", lambda *_, **__: None)
    model, (losses, _, _) = models("llama")
    arguments = model.state_dict(), told(model), Grid(1, 2), tmp_path, torch.float32
    run_ranks(with_keys, Grid(1, 2), arguments, {})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert not np.allclose([row["lm loss"] for row in rows], losses, atol=1e-3, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("keys", [{}, {"params_dtype": "bf16"}, {"use_distributed_optimizer": True}])
@pytest.mark.parametrize("grids", [(Grid(1, 2), Grid(1, 2)), (Grid(2, 2), Grid()), (Grid(), Grid(1, 2))])
def test_a_tied_model_goes_on_from_its_checkpoint(grids, keys, models, tmp_path):
    """On the same grid to the byte; on another the embedding is there for both uses."""
    model, _ = models("qwen3")
    arguments = model.state_dict(), told(model)
    copies = 1 + ("use_distributed_optimizer" in keys)
    for run, parts in (
        ("whole", [(0, STEPS, grids[0])]),
        ("parts", [(0, 3, grids[0]), (3, STEPS, grids[1])]),
    ):
        (tmp_path / run).mkdir()
        for start, stop, grid in parts:
            run_ranks(segment, grid, *arguments, grid, tmp_path / run, start, stop, keys, copies=copies)

    whole, parts = (
        [json.loads(line)["lm loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    assert np.allclose(whole, parts, atol=2e-2 if "params_dtype" in keys else 1e-5, rtol=0)
    if grids[0] == grids[1]:
        ends = [files.check_manifest(tmp_path / run / f"iter_{STEPS:07d}") for run in ("whole", "parts")]
        assert ends[0]["facts"]["merkle"] == ends[1]["facts"]["merkle"]
