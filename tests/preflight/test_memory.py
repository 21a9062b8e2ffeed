"""The memory that is foretold, and the bytes of the tensors that a real model has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.config.run import Run
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.preflight import memory, ranks
from plait.train.build import DTYPES, build_chunks, build_model, optimizer_of, wrap
from plait.verify.ranks import run_ranks

CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 500, "hidden_size": 64,
    "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "sliding_window": None,
}  # fmt: skip
SEQUENCE = 128


def settings(grid, cp=1, copies=1, **keys):
    run = Run(
        recipe="chat", model="m", mixture="x", train_iters=9, save_interval=9, global_batch_size=8 * copies,
        micro_batch_size=2, tensor_model_parallel_size=grid.tp, pipeline_model_parallel_size=grid.pp,
        context_parallel_size=cp, data_parallel_size=copies, **keys,
    )  # fmt: skip
    return run.model_dump(mode="json")


def storages(tensors):
    """Bytes of memory that tensors lie in, each counted once."""
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


def held(spec, grid, run):
    """What this rank holds after a step: weights, gradients, masters, moments."""
    model = wrap(build_chunks(spec, grid, dtype=DTYPES[run["params_dtype"]], run=run), run)
    optimizer = optimizer_of(model, run)
    buffers = [buffer for chunk in model for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    for buffer in buffers:
        buffer.grad_data.fill_(1e-3)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    for parameter in parameters:
        torch.nn.init.ones_(parameter)
    optimizer.step()
    weights = storages(parameters)
    masters = storages(p for group in optimizer.param_groups for p in group["params"])
    parts = [one.optimizer for one in optimizer.chained_optimizers]
    states = [state for part in parts for state in part.state.values()]
    moments = storages(t for state in states for t in state.values() if torch.is_tensor(t) and t.dim())
    shards = [p for group in optimizer.param_groups for p in group["params"]]
    own = [p for p in shards if p.untyped_storage().data_ptr() not in weights]
    return {
        "weights": sum(weights.values()),
        "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers),
        "masters": sum(masters[p.untyped_storage().data_ptr()] for p in own),
        "moments": sum(moments.values()),
    }


MIXTRAL = {
    **CONFIG, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
INTERLEAVED = {"virtual_pipeline_model_parallel_size": 2}
STATIC = {
    "fp32": (Grid(), {"params_dtype": "fp32"}),
    "bf16": (Grid(), {}),
    "bf16 in stages of tensor parallel ranks": (Grid(2, 2), {}),
    "sgd": (Grid(), {"optimizer": "sgd"}),
    "sgd without momentum": (Grid(), {"optimizer": "sgd", "sgd_momentum": 0.0}),
    "copies": (Grid(), {"copies": 2}),
    "shared": (Grid(), {"copies": 2, "use_distributed_optimizer": True}),
    "shared in fp32": (Grid(), {"copies": 3, "use_distributed_optimizer": True, "params_dtype": "fp32"}),
    "experts": (Grid(), {"copies": 2, "expert_model_parallel_size": 2}),
    "shared experts": (
        Grid(),
        {"copies": 4, "expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
    "experts of tensor parallel ranks": (
        Grid(2, 1),
        {"copies": 2, "expert_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "chunks": (Grid(1, 2), INTERLEAVED),
    "shared chunks": (Grid(1, 2), {**INTERLEAVED, "copies": 2, "use_distributed_optimizer": True}),
    "chunks of tensor parallel ranks": (Grid(2, 2), {**INTERLEAVED, "params_dtype": "fp32"}),
    "shared by who shares sequences": (Grid(1, 2), {"cp": 2, "use_distributed_optimizer": True}),
}


def by_place(found):
    """The chunks of each rank."""
    return [
        [one for one in found if one.place == place] for place in dict.fromkeys(one.place for one in found)
    ]


@pytest.mark.parametrize("case", STATIC)
def test_weights_gradients_and_the_optimizers_state_to_the_byte(case):
    grid, keys = STATIC[case]
    run, spec = settings(grid, **keys), Spec.from_config(MIXTRAL if "experts" in case else CONFIG)
    cp, copies, ep = (run[f"{axis}_parallel_size"] for axis in ("context", "data", "expert_model"))
    chunks = run["virtual_pipeline_model_parallel_size"]
    found = run_ranks(held, grid, spec, grid, run, copies=copies, cp=cp, ep=ep, chunks=chunks)
    shape = memory.Run(run, grid, copies, SEQUENCE)
    equal = grid.tp * cp * copies
    for rank, *more in by_place(ranks.checked(spec, grid, run)):
        assert len(more) + 1 == (chunks or 1)
        told = memory.estimate([rank, *more], spec, shape)
        stage = found[rank.pp * equal : (rank.pp + 1) * equal]
        ours = [one for number, one in enumerate(stage) if number % grid.tp == rank.tp]
        for row in ("weights", "gradients"):
            assert {one[row] for one in ours} == {told[row]}
        for row in ("masters", "moments"):
            assert sum(one[row] for one in ours) == told[row] * len(ours)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 20_000))
def test_a_padded_buffer_divides_evenly_and_wastes_little(sizes, shares, bucket):
    for limit in (None, bucket):
        found = memory.padded(sizes, shares, limit)
        assert found % shares == 0
        assert found % 128 == 0
        assert sum(sizes) <= found <= sum(sizes) + len(sizes) * (63 + 128 * shares)


def test_overlapped_buckets_are_those_that_megatron_lays_out(monkeypatch):
    monkeypatch.setattr(memory, "BUCKET", 10_000)
    run, spec = settings(Grid(), copies=2, use_distributed_optimizer=True), Spec.from_config(CONFIG)
    (rank,) = ranks.ranks_of(spec, Grid(), dtype=torch.bfloat16, run=run)
    found = run_ranks(numel, Grid(), spec, run, 10_000, copies=2)
    assert set(found) == {memory.padded(rank.trained(), 2, 10_000)}


def under_way(shape, stage):
    """Passes through a chunk whose activations a stage holds at once; without chunks, micro-batches."""
    return max(map(sum, shape.waiting(stage)))


def numel(spec, run, bucket):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = build_model(spec, Grid(), dtype=torch.bfloat16, run=run)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket
    )
    return DistributedDataParallel(model.config, ddp, model.bfloat16()).buffers[0].numel


def saved(spec, grid, run):
    """Bytes that the backward pass of this rank's first chunk waits with, parameters not counted."""
    from megatron.core import parallel_state

    from plait.train import kernels
    from plait.train.batches import masked_out

    inner = build_chunks(spec, grid, dtype=DTYPES[run["params_dtype"]], run=run)[0]
    (model,) = wrap([inner], run)
    batch, own = run["micro_batch_size"], SEQUENCE // run["context_parallel_size"]
    ids, places = torch.randint(0, 400, (batch, own)), torch.arange(own).expand(batch, own)
    mask = masked_out(torch.zeros(batch, SEQUENCE))[:, :, :own]
    if not parallel_state.is_pipeline_first_stage():
        shape = (own // (grid.tp if run["sequence_parallel"] else 1), batch, spec.hidden_size)
        inner.set_input_tensor(torch.randn(shape, dtype=DTYPES[run["params_dtype"]], requires_grad=True))
    parameters, found, kept = storages(model.parameters()), {}, []

    def pack(tensor):
        kept.append(tensor)  # what is freed would give its place to another
        found.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, places, mask, labels=ids)
    for shared in (kernels._documents, kernels._turns):
        found.update(
            storages(one for made in shared.known.values() for ones in made.values() for one in ones)
        )
    return sum(size for place, size in found.items() if place not in parameters)


FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}
ACTIVATIONS = {
    "fp32": (Grid(), {"params_dtype": "fp32"}),
    "bf16": (Grid(), {}),
    "tensor parallel": (Grid(2, 1), {}),
    "sequence parallel": (Grid(2, 1), {"sequence_parallel": True}),
    "stages": (Grid(1, 2), {}),
    "context parallel": (Grid(), {"cp": 2}),
    "selective": (Grid(), {"recompute_granularity": "selective"}),
    "uniform": (Grid(), {**FULL, "recompute_method": "uniform"}),
    "block": (Grid(), {**FULL, "recompute_method": "block"}),
    "dropouts": (Grid(), {"params_dtype": "fp32", "hidden_dropout": 0.1, "attention_dropout": 0.1}),
}


@pytest.mark.parametrize("groups", [4, 8])
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_are_those_that_the_backward_pass_waits_with(case, groups):
    """Within 1.5 %: indices and sums of a few values a token are left out."""
    grid, keys = ACTIVATIONS[case]
    run, spec = settings(grid, **keys), Spec.from_config({**CONFIG, "num_key_value_heads": groups})
    shape = memory.Run(run, grid, 1, SEQUENCE, gpu=False)
    for number, found in enumerate(run_ranks(saved, grid, spec, grid, run, cp=shape.cp)):
        stage = number // (grid.tp * shape.cp)
        told = memory.activations(stage, spec, shape)
        last = stage == grid.pp - 1
        assert under_way(shape, stage) == grid.pp - stage
        softmax = told["logits"] * 4 / (4 + (2 if shape.size == 2 else 0))
        if last:
            assert told["activations"] + softmax == pytest.approx(found, rel=0.015)
        else:
            assert told["activations"] / (grid.pp - stage) == pytest.approx(found, rel=0.015)


QWEN3 = {
    **{key: value for key, value in CONFIG.items() if key != "sliding_window"},
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("case", ["bf16", "tensor parallel", "selective"])
def test_norms_of_heads_keep_queries_and_keys(case):
    grid, keys = ACTIVATIONS[case]
    run, spec = settings(grid, **keys), Spec.from_config(QWEN3)
    told = memory.activations(0, spec, memory.Run(run, grid, 1, SEQUENCE, gpu=False))
    for found in run_ranks(saved, grid, spec, grid, run):
        assert told["activations"] + told["logits"] * 4 / 6 == pytest.approx(found, rel=0.015)


@pytest.mark.parametrize(
    "keys", [{}, {"copies": 2, "use_distributed_optimizer": True}], ids=["alone", "shared"]
)
def test_a_tied_embedding_is_held_once(keys):
    run, spec = settings(Grid(2, 1), **keys), Spec.from_config({**QWEN3, "tie_word_embeddings": True})
    copies = keys.get("copies", 1)
    found = run_ranks(held, Grid(2, 1), spec, Grid(2, 1), run, copies=copies)
    for rank in ranks.checked(spec, Grid(2, 1), run):
        told = memory.static(rank, memory.Run(run, Grid(2, 1), copies, SEQUENCE))
        ours = found[rank.tp :: 2]
        assert {one["weights"] for one in ours} == {told["weights"]}
        assert sum(one["moments"] for one in ours) == told["moments"] * copies


@pytest.mark.parametrize("grid", [Grid(), Grid(2, 1)], ids=str)
def test_experts_keep_the_tokens_that_are_sent_to_them(grid):
    """Within 8 %: the router's own values are left out, and experts are taken as used evenly."""
    keys = {"copies": 2, "expert_model_parallel_size": 2, "sequence_parallel": grid.tp > 1}
    run, spec = settings(grid, **keys), Spec.from_config(MIXTRAL)
    shape = memory.Run(run, grid, 2, SEQUENCE, gpu=False)
    found = run_ranks(saved, grid, spec, grid, run, copies=2, ep=2)
    told = memory.activations(0, spec, shape)
    assert told["activations"] + told["logits"] * 4 / 6 == pytest.approx(sum(found) / len(found), rel=0.08)


def schedule(micro_batches, chunks):
    """Megatron's own: passes before the first backward one, and which chunk goes when."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    _, _, ahead, _ = get_pp_rank_microbatches(micro_batches, chunks, stages)
    return ahead, [chunk for _, chunk in get_schedule_table(micro_batches, chunks, stages)]


@pytest.mark.parametrize("layers", [pytest.param(4, id="2 chunks"), pytest.param(8, id="4 chunks")])
def test_passes_wait_as_in_megatrons_interleaved_schedule(layers):
    """Replayed by Megatron's own table: after those that go ahead, one forward and one backward in turn."""
    grid, chunks = Grid(1, 2), layers // 2
    run = settings(grid, virtual_pipeline_model_parallel_size=chunks)
    shape = memory.Run(run, grid, 1, SEQUENCE)
    for stage, (ahead, table) in enumerate(
        run_ranks(schedule, grid, shape.micro_batches, chunks, chunks=chunks)
    ):
        assert len(table) == shape.micro_batches * chunks
        counts = [
            tuple(
                table[: number + 1].count(chunk) - table[: max(0, number - ahead)].count(chunks - 1 - chunk)
                for chunk in range(chunks)
            )
            for number in range(len(table))
        ]
        assert [*shape.waiting(stage)] == counts
        assert under_way(shape, stage) == min(ahead + 1, len(table))


def test_a_pass_through_a_chunk_keeps_what_its_layers_do():
    """Within 1.5 %, as for whole stages; the first stage of two holds five of its passes at once."""
    grid, spec = Grid(1, 2), Spec.from_config(CONFIG)
    run = settings(grid, **INTERLEAVED)
    found, _ = run_ranks(saved, grid, spec, grid, run, chunks=2)
    shape = memory.Run(run, grid, 1, SEQUENCE, gpu=False)
    assert under_way(shape, 0) == 5
    assert memory.activations(0, spec, shape)["activations"] == pytest.approx(5 * found, rel=0.015)


def test_less_is_kept_the_more_is_recomputed():
    spec = Spec.from_config({**CONFIG, "num_hidden_layers": 16})

    def kept(**keys):
        found = memory.activations(0, spec, memory.Run(settings(Grid(), **keys), Grid(), 1, SEQUENCE))
        return found["activations"], sum(found.values())

    none, selective = kept(), kept(recompute_granularity="selective")
    full = kept(**FULL, recompute_method="uniform")
    assert none[0] > selective[0] > full[0]
    assert none[1] > selective[1] > full[1]


def test_attention_that_is_told_of_documents_keeps_no_scores():
    engine = {"transformer_impl": "transformer_engine", "params_dtype": "bf16"}
    spec, kept = Spec.from_config(CONFIG), {}
    for backend in ("flash", "unfused"):
        run = settings(Grid(tp=2), **engine, attention_backend=backend)
        layer = memory.language_layer(spec, memory.Run(run, Grid(tp=2), 1, SEQUENCE))
        kept[backend] = layer
    tokens, heads = 2 * SEQUENCE, CONFIG["num_attention_heads"] // 2
    assert kept["flash"].scores == tokens * heads * 4
    assert kept["unfused"].scores == tokens * heads * SEQUENCE * (4 + 2)
    assert kept["flash"].attention < kept["unfused"].attention / 10
