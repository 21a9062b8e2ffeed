"""Transformer Engine's layers: by a stand-in of its classes, as no GPU is here; see ``engine_stand_in``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from plait.config.run import Run, attends_by_documents, pieces_of_sequence, without_engine
from plait.convert.tables import engine_name
from plait.parallel.grid import Grid
from plait.tokens import roles
from plait.tokens.indexed import Pack
from plait.train import state
from plait.train.batches import Collator, masked_out, positions
from plait.train.model import documents_of
from plait.verify.ranks import run_ranks

HERE = Path(__file__).parent
WITHIN = {
    "self_attention": "SelfAttention", "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
    "self_attention.linear_proj": "TERowParallelLinear", "input_layernorm": "IdentityOp",
}  # fmt: skip
DENSE = WITHIN | {
    "pre_mlp_layernorm": "IdentityOp", "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
}  # fmt: skip
ROUTED = WITHIN | {"pre_mlp_layernorm": "RMSNorm", "mlp.router": "TopKRouter"}
EXPERT = "mlp.experts.local_experts.0.linear_fc1"
LAYERS = {
    "documents": DENSE,
    "documents in a window": DENSE,
    "documents, layers again": DENSE,
    "documents, attention again": DENSE,
    "a mask": DENSE,
    "a mask with a window": DENSE,
    "a mask, fp32": DENSE,
    "a picture model": DENSE,
    "experts": ROUTED | {"mlp.experts": "SequentialMLP", EXPERT: "TEColumnParallelLinear"},
    "experts as one": ROUTED
    | {"mlp.experts": "TEGroupedMLP", "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear"},
}
"""Of each case, some of Megatron Core's classes in a layer."""
RUN = {
    "recipe": "chat", "model": "m", "mixture": "x", "train_iters": 10, "save_interval": 10,
    "transformer_impl": "transformer_engine",
}  # fmt: skip
ROWS = {
    "decoder.layers.3.input_layernorm.weight": "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.12.pre_mlp_layernorm.weight": "decoder.layers.12.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight": (
        "decoder.layers.0.mlp.experts.linear_fc1.weight2"
    ),
    "language_model.decoder.layers.0.input_layernorm.weight": (
        "language_model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    ),
    **{
        name: name
        for name in (
            "decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight",
            "embedding.word_embeddings.weight", "vision_patch.weight",
        )
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """What each case is by the layers of the stand-in, from a process in which Megatron Core finds it."""
    path = os.pathsep.join([str(HERE), *sys.path])
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"}
    words = [sys.executable, "-W", "ignore", str(HERE / "engine_stand_in.py"), "cases"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_case_is_here(found):
    assert found.keys() == LAYERS.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_made_of_transformer_engines_parts(name, found):
    layers = found[name]["layers"]
    core = "TEDotProductAttention" if "mask" in name else "DocumentAttention"
    wanted = LAYERS[name] | {"self_attention.core_attention": core, "final_layernorm": "RMSNorm"}
    assert {part: layers.get(part) for part in wanted} == wanted


@pytest.mark.parametrize("name", LAYERS)
def test_no_document_sees_another_and_all_is_computed_as_by_megatrons_own_layers(name, found):
    assert found[name]["losses"] < 1e-5
    assert found[name]["gradients"] < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpoint_of_either_layers_is_read_by_both_and_by_the_export(name, found):
    assert found[name]["saved"] == []
    assert found[name]["passed"] == {"own": True, "fused": True}


@pytest.mark.parametrize("name", LAYERS)
def test_a_classic_file_by_its_names_has_what_the_model_has(name, found):
    assert found[name]["filed"] == []


@pytest.mark.parametrize("name", ["documents", "experts", "experts as one"])
def test_a_run_of_either_layers_goes_on_by_the_other_with_its_optimizer(name, found):
    assert found[name]["goes on"] < 1e-4


def test_a_mask_or_no_documents_are_refused_where_a_document_would_see_another(found):
    assert found["documents"]["refused"] == ["a mask", "nothing"]


@pytest.mark.parametrize("name", ROWS)
def test_the_name_in_its_layers(name):
    assert engine_name(name) == ROWS[name]


def test_norms_have_the_names_by_which_megatron_core_saves_its_own():
    theirs = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
    assert theirs
    for own, saved in theirs.items():
        assert engine_name(f"decoder.layers.5.{own}weight") == f"decoder.layers.5.{saved}weight"


def run(**keys):
    return Run(**RUN | keys).model_dump()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, True),
        ({"attention_backend": "flash"}, True),
        ({"attention_backend": "fused", "params_dtype": "fp16"}, True),
        ({"fp8": "hybrid"}, True),
        ({"attention_backend": "unfused"}, False),
        ({"params_dtype": "fp32"}, False),
        ({"transformer_impl": "local"}, False),
    ],
)
def test_which_attention_is_told_where_documents_begin(keys, told):
    assert attends_by_documents(run(**keys)) == told


def collated(*, by_documents):
    """Two packs: documents of 3, 1 and 2 tokens, and one of 2."""
    sep, none = roles.PACK_SEP, np.zeros(0, dtype=int)
    packs = [
        Pack(np.array(text), np.array(role), none, [], None)
        for text, role in (([1, 2, 3, 4, 5, 6], [2, 2, 2, sep, sep, 2]), ([7, 8], [2, 2]))
    ]
    return Collator(8, 0, (2,), (), 32, 1024, vision=False, by_documents=by_documents)(packs)


def test_documents_of_sequences_laid_end_to_end():
    batch = collated(by_documents=True)
    assert batch.attention_mask is None
    laid = documents_of(batch.position_ids)
    assert laid.cu_seqlens_q.tolist() == [0, 3, 4, 6, 8, 10, 16]
    assert (laid.cu_seqlens_q.dtype, laid.max_seqlen_q, laid.cu_seqlens_kv) == (
        torch.int32, 8, laid.cu_seqlens_q,
    )  # fmt: skip


def test_documents_are_those_of_the_mask():
    batch = collated(by_documents=False)
    bounds = documents_of(batch.position_ids).cu_seqlens_q
    number = torch.bucketize(torch.arange(16), bounds, right=True).reshape(2, 8)
    assert torch.equal(batch.attention_mask, masked_out(number))


def test_padding_is_a_document_of_its_own():
    places = positions(np.array([[0, 0, -1, -1], [0, 0, 0, 0]]))
    assert documents_of(torch.from_numpy(places)).cu_seqlens_q.tolist() == [0, 2, 4, 8]


def test_fp8_counts_tokens_in_sixteens():
    shared = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert [pieces_of_sequence(run(**keys)) for keys in ({}, {"fp8": "e4m3"}, {"fp8": "e4m3"} | shared)] == [
        1, 16, 32,
    ]  # fmt: skip


def test_a_run_without_its_layers_can_be_built_here():
    keys = {"fp8": "hybrid", "moe_grouped_gemm": True, "cpu_offloading_num_layers": 1}
    assert without_engine(run(**keys)) == run(transformer_impl="local")


def test_userbuffers_are_made_as_transformer_engine_2_9_reads_them(monkeypatch):
    from types import SimpleNamespace

    from plait.train import engine

    told = {}
    modes = SimpleNamespace(FP8="in fp8", NONE="plain")
    base = SimpleNamespace(UserBufferQuantizationMode=modes, initialize_ub=lambda **keys: told.update(keys))
    monkeypatch.setattr(
        engine, "import_module", lambda name: {"transformer_engine.pytorch.module.base": base}[name]
    )
    shared = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 4}
    engine.share_buffers(run(fp8="hybrid", tp_comm_overlap=True, **shared), 64, 32, torch.bfloat16)
    assert told == {
        "shape": [256, 32], "tp_size": 2, "quantization_modes": ["in fp8"], "dtype": torch.bfloat16,
        "bootstrap_backend": "nccl",
    }  # fmt: skip


def test_generators_of_a_gpu_are_not_those_of_a_machine_without(caplog):
    before = torch.get_rng_state()
    state._draw_on({"torch": torch.zeros_like(before), "device": torch.zeros(16), "tracker": {}})
    assert torch.equal(torch.get_rng_state(), before)
    assert "generators begin anew: the checkpoint was trained with a GPU" in caplog.text


def visible():
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_proofs_ranks_see_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run_ranks(visible, Grid()) == [""]


def test_only_the_layers_module_names_transformer_engine():
    """Its mere presence breaks the import of Megatron Core without CUDA: nothing else imports it."""
    source = HERE.parents[1] / "src/plait"
    named = re.compile(r"transformer_engine\.|extensions\.transformer_engine|import transformer_engine")
    files = {path.name for path in source.rglob("*.py") if named.search(path.read_text())}
    assert files == {"engine.py"}
