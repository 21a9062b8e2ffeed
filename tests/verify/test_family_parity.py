"""Each family computes in Megatron Core, on every grid, what transformers computes."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import megatron.core.models.gpt  # noqa: F401 - loaded once here, not in every forked rank
import pytest
import torch
import transformers.models.llama.modeling_llama
from ties import stage_of

from plait.convert import tables
from plait.convert.forms import coverage
from plait.errors import CheckpointError
from plait.models import specs
from plait.models.build import build
from plait.models.families import BY_ARCHITECTURE, Family
from plait.models.families.family import SILU
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid
from plait.preflight.ranks import checked
from plait.verify import logits, parity
from plait.verify.cases import cases
from plait.verify.reference import of_transformers

LONG = pytest.mark.long
SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
STRETCHED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, scaled": ("Llama", {"rope_parameters": SCALED}),
    "llama, stretched": ("Llama", {"rope_parameters": STRETCHED}),
    "llama, scaled and tied": ("Llama", {"rope_parameters": SCALED, "tied": True}),
    "mistral v0.1": ("Mistral", {"sliding_window": 8}),
    "mistral v0.3": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tied": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, tied": ("Qwen3", {"head_dim": 12, "tied": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "initializer_range": 0.3}),
}
GRIDS = [Grid(1, 1), Grid(2, 1), Grid(1, 2), Grid(2, 2)]
SHORT = {
    "llama": 1, "llama, scaled": 2, "llama, stretched": 1, "llama, scaled and tied": 2, "qwen2, tied": 1,
    "qwen3": 2, "qwen3, tied": 1,
}  # fmt: skip
"""Tensor parallel ranks of the short run; the long one tries every family on one and on two."""
CASES = [
    pytest.param(name, tp, id=f"{name}, {tp}", marks=() if SHORT.get(name) == tp else LONG)
    for name in FAMILIES
    for tp in (1, 2)
]


def folder_of(maker, name):
    kind, sizes = FAMILIES[name]
    return maker.foreign(kind, **{"name": f"-{name}", "initializer_range": 0.1, **sizes})


class Loaded:
    """Loads a layer from the Hugging Face folder itself."""

    def __init__(self, folder: Path, tp: int) -> None:
        self.spec, self.tp = Spec.of(folder), tp
        self.weights = FolderTensors(folder)

    def __call__(self, stage, layer):
        from megatron.core import parallel_state as ps

        from plait.train.build import load_weights

        rank, stages = ps.get_tensor_model_parallel_rank(), Grid(self.tp, self.spec.num_layers)
        load_weights(stage, stage_of(self.weights, self.spec, stages, rank, layer))


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_the_logits_are_those_of_transformers(maker, name, tp):
    folder = folder_of(maker, name)

    rows = parity.computed(folder, Spec.of(folder), tp, Loaded(folder, tp))

    assert logits.failures(**rows) == []
    assert min(row["max_abs_logit"] for row in rows["logits"]) > 0.5


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in SHORT or name == "mixtral"])
def test_layer_by_layer_the_reference_is_the_whole_model(maker, name):
    """Parts of transformers' model, one after the other, give bit for bit what it gives in one piece."""
    folder = folder_of(maker, name)
    inputs = cases(Spec.of(folder))[:1]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if name == "mixtral":
        model.set_experts_implementation("eager")

    with torch.no_grad():
        whole = model(input_ids=inputs[0].input_ids, output_hidden_states=True)
    parts = of_transformers(folder, inputs)

    assert torch.equal(parts[torch.float32][0], whole.logits)


@pytest.mark.parametrize("name", ["llama, scaled", "llama, stretched", "qwen3", "qwen2, tied"])
def test_what_a_family_adds_is_seen_by_the_logits(maker, name):
    """A model without it computes otherwise: scaling, norms of heads, the tie."""
    folder = folder_of(maker, name)
    theirs = of_transformers(folder, inputs := cases(Spec.of(folder))[:1])[torch.float32][0]
    other = {"llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **other.get(name.split(",")[0], {}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "q_norm" in parameter_name:
                parameter.fill_(1.0)
        if name.endswith("tied"):
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, 0))
        changed = model(input_ids=inputs[0].input_ids).logits
    assert (changed - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama, scaled", "qwen2, tied", "qwen3"])
def test_a_family_is_proven_through_the_stages(maker, name, tmp_path):
    """Convert, shard and prove, as the workflow does."""
    folder = folder_of(maker, name)
    found = parity.prove_converted(folder, maker.shards(folder, 2, 2), tmp_path / "parity.json")
    assert found["passed"]


NEW = Family(
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    defaults={},
    traits={"attention_bias": True},
    refused=(SILU,),
    inert=frozenset(("attention_bias", "attention_out_bias", "mlp_bias", "residual_dropout")),
)


def test_a_family_is_added_by_its_tables_and_a_tiny_config(maker, tmp_path, monkeypatch):
    """One that is not here: of rows that it lacks, the proof of coverage says which."""
    folder = maker.foreign("SeedOss", initializer_range=0.1, attention_bias=True, head_dim=12)
    with pytest.raises(CheckpointError, match="is of architecture SeedOssForCausalLM"):
        Spec.of(folder)

    monkeypatch.setitem(BY_ARCHITECTURE, NEW.architecture, NEW)
    monkeypatch.setattr(specs, "ARCHITECTURES", (*BY_ARCHITECTURE, specs.LLAVA))  # it follows from that
    monkeypatch.setitem(tables.TABLES, NEW.architecture, tables.MISTRAL)
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj.bias is in no row of the table"):
        coverage(Spec.of(folder))

    monkeypatch.setitem(tables.TABLES, NEW.architecture, tables.MISTRAL + tables.QKV_BIAS)
    assert parity.prove_converted(folder, maker.shards(folder, 2, 2), tmp_path / "parity.json")["passed"]


SEEING = {
    "qwen3": Grid(2, 1),
    "llama, scaled": Grid(1, 2),
    "qwen2, tied": Grid(2, 2),
    "mistral v0.3": Grid(1, 1),
    "mixtral": Grid(2, 2),
}


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        pytest.param(
            name, tower, marks=() if (name, tower) in {("qwen3", "clip"), ("mixtral", "siglip")} else LONG
        )
        for name in SEEING
        for tower in ("clip", "siglip")
    ],
)
def test_a_llava_over_any_family(maker, name, tower, tmp_path):
    """A tied base is untied when the model is built."""
    folder = maker.llava(f"{tower}-{name}", base=folder_of(maker, name), tower=maker.tower(tower))
    grid = SEEING[name]
    found = parity.prove_converted(folder, maker.shards(folder, grid.tp, grid.pp), tmp_path / "parity.json")
    assert {row["case"] for row in found["logits"]} == {"text", "packed", "one picture", "several pictures"}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_solo_over_a_tied_and_scaled_llama(maker, tp):
    """Its base stays tied, and its class computes with the base's angles."""
    source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}
    parts = [folder_of(maker, "llama, scaled and tied"), maker.vision]
    folder = maker._once("solo-tied", "hf_model", lambda f: build(f, source, parts))
    spec = Spec.of(folder)
    assert (spec.tied, spec.rope.kind) == (True, "llama3")

    rows = parity.computed(folder, spec, tp, Loaded(folder, tp))

    assert len(rows["logits"]) == 3
    assert logits.failures(**rows) == []


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranks_on_the_meta_device_hold_a_tied_model(maker, grid):
    """The first stage has the embedding, the last of several a copy, and nobody a head of its own."""
    spec = Spec.of(folder_of(maker, "qwen3, tied"))
    for rank in checked(spec, grid, {"params_dtype": "fp32"}):
        ends = [name for name in rank.shapes if name.startswith(("embedding.", "output_layer."))]
        first, last = rank.pp == 0, rank.pp == grid.pp - 1
        assert ends == ["embedding.word_embeddings.weight"] * first + ["output_layer.weight"] * (
            last and not first
        )
        assert "decoder.layers.0.self_attention.q_layernorm.weight" in rank.shapes
