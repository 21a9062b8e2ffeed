"""The proof passes on every grid, and no classic fault of a converter passes it."""

import json
from pathlib import Path

import megatron.core.models.gpt  # noqa: F401 - loaded once here, not in every forked rank
import pytest
import torch
import transformers.models.mistral.modeling_mistral  # noqa: F401
from makers import made
from mutants import prove

from plait import files, layout
from plait.convert import folders
from plait.errors import PlaitError, ProofError
from plait.models.weights import merkle
from plait.parallel.grid import Grid
from plait.verify import cases, logits, parity
from plait.verify.ranks import run_ranks
from plait.verify.states import PRECISIONS

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("kind", ["hf", "solo"])
@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_a_sharded_model_computes_what_transformers_computes(maker, kind, tp, pp, tmp_path):
    source = getattr(maker, kind)()
    found = parity.prove_converted(source, maker.shards(source, tp, pp), tmp_path / "parity.json")
    assert found == json.loads((tmp_path / "parity.json").read_text())
    assert found["merkle_root"] == files.read_manifest(source)["facts"]["merkle"]
    assert found["grid"] == {"tp": tp, "pp": pp}
    assert {row["case"] for row in found["logits"]} == {"text", "packed"} | (
        {"picture"} if kind == "solo" else set()
    )
    for row in found["logits"]:
        assert row["max_abs_diff"] <= row["tolerance"] == 1e-5
        assert row["max_abs_diff_fp32"] <= 1e-5
        assert row["top1_equal"] == row["positions"] == 96
        assert row["max_abs_logit"] > 0.5  # a model that says nothing proves nothing
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    for row in found["layers"]:
        assert row["max_abs_diff"] <= 1e-12 * row["max_abs_state"]
        assert row["max_abs_state"] > 0.1


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1)])
def test_multi_head_and_multi_query_attention_are_proven(maker, heads, groups, tmp_path):
    source = maker.hf(f"{heads}-{groups}", num_attention_heads=heads, num_key_value_heads=groups)
    parity.prove_converted(source, maker.megatron(source), tmp_path / "whole.json")
    parity.prove_converted(source, maker.shards(source, min(groups, 2), 2), tmp_path / "shards.json")


def test_a_sliding_window_is_proven(maker, tmp_path):
    """Mistral v0.1 sees 4,096 tokens back; here 8 of the proof's 48."""
    source = tmp_path / "windowed"
    source.mkdir()
    for path in maker.hf().iterdir():
        if path.name != "plait.json":
            (source / path.name).write_bytes(path.read_bytes())
    config = files.read_json(source / "config.json")
    files.write_json(source / "config.json", {**config, "sliding_window": 8})
    facts = files.read_manifest(maker.hf())["facts"]
    files.write_manifest(source, kind="hf_model", settings={}, facts=facts)
    prove(source, tmp_path / "run", Grid(2, 1))


@pytest.fixture
def lively(maker):
    """A model whose norms differ, so that their places show."""
    from safetensors.torch import load_file, save_file

    source = maker.root / "lively"
    if not source.exists():
        source.mkdir()
        for path in maker.hf().iterdir():
            if path.name != "plait.json":
                (source / path.name).write_bytes(path.read_bytes())
        weights = load_file(source / "model.safetensors")
        draw = torch.Generator().manual_seed(3)
        for name, tensor in weights.items():
            if "norm" in name:
                weights[name] = 1 + 0.3 * torch.randn(tensor.shape, generator=draw)
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        files.write_manifest(source, kind="hf_model", settings={}, facts={"merkle": merkle(weights)})
    return source


def test_the_lively_model_is_proven_without_a_fault(lively, tmp_path):
    prove(lively, tmp_path / "run", Grid(2, 2))


def test_a_flipped_byte_of_a_shard_is_named(lively, tmp_path):
    prove(lively, tmp_path / "run", Grid(2, 1))
    path = next((tmp_path / "run" / "cut").rglob("*.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(PlaitError, match="does not have the sha256"):
        parity.prove_converted(lively, tmp_path / "run" / "cut", tmp_path / "again.json")
    assert not (tmp_path / "again.json").exists()


def test_code_that_plait_did_not_write_is_not_run(maker, tmp_path):
    source = maker.solo()
    strange = tmp_path / "strange"
    strange.mkdir()
    for path in source.iterdir():
        (strange / path.name).write_bytes(path.read_bytes())
    with (strange / "modeling_solo.py").open("a") as file:
        file.write("\nopen('/tmp/plait-was-here', 'w')\n")
    (strange / "plait.json").unlink()
    files.write_manifest(strange, kind="hf_model", settings={}, facts=files.read_manifest(source)["facts"])
    with pytest.raises(ProofError, match="not plait's own code"):
        parity.prove_converted(strange, maker.shards(source, 1, 1), tmp_path / "parity.json")


def fails_on_rank_one():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("the second rank is unwell")


def test_a_failing_rank_ends_the_others_and_is_quoted():
    with pytest.raises(ProofError, match="the second rank is unwell"):
        run_ranks(fails_on_rank_one, Grid(2, 1))


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({}, False),
        ({"max_abs_diff": 2e-5}, True),
        ({"max_abs_diff": float("nan")}, True),
        ({"max_abs_diff_fp32": 1e-3}, True),
        ({"max_abs_diff_fp32": float("nan")}, True),
        ({"top1_equal": 9}, True),
    ],
)
def test_each_figure_of_a_comparison_decides(change, fails):
    row = {
        "case": "text", "positions": 10, "max_abs_logit": 10.0, "max_abs_diff": 1e-6,
        "max_abs_diff_fp32": 1e-5, "top1_equal": 10, "tolerance": 1e-5, "tolerance_fp32": 3e-4,
    }  # fmt: skip
    assert bool(logits.failures([row | change])) == fails


@pytest.mark.parametrize(
    ("want", "found", "equal"),
    [
        ([0.0, 1.0, 1.0], [0.0, 1.0, 1.0 + 1e-15], 2),
        ([0.0, 1.0, 1.0], [0.0, 1.0 + 1e-15, 1.0], 2),
        ([0.0, 1.0, 1.0 + 1e-9], [0.0, 1.0 + 1e-9, 1.0], 1),
        ([0.0, 1.0, 1.0], [1.5, 1.0, 1.0], 1),
        ([0.0, 1.0, 1.0], [float("nan"), 1.0, 1.0], 1),
    ],
)
def test_of_two_tokens_that_are_equally_likely_each_is_the_likeliest(want, found, equal):
    """Only where nothing but rounding decides between them."""
    want, have = (torch.tensor([[one, [3.0, 2.0, 1.0]]], dtype=torch.float64) for one in (want, found))
    case = cases.Case("text", torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    pairs = [{dtype: [one.to(dtype)] for dtype in PRECISIONS} for one in (want, have)]
    (row,) = logits.compare([case], *pairs, depth=2)
    assert row["top1_equal"] == equal


def test_of_the_layers_that_are_wrong_the_first_is_named():
    near = {
        "max_abs_state": 2.0, "max_abs_diff": 1e-6, "max_abs_diff_fp32": 1e-6, "tolerance": 2e-5,
        "tolerance_fp32": 6e-5,
    }  # fmt: skip
    far = near | {"max_abs_diff": 0.1, "max_abs_diff_fp32": 0.1}
    said = logits.failures([], [{"layer": n, **(near if n < 3 else far)} for n in range(6)])
    assert len(said) == 1
    assert said[0].startswith("layer 3: max abs difference 0.1 (tolerance 2e-05)")


def test_a_tolerance_follows_arithmetic_and_depth():
    assert logits.tolerance(torch.float64, 8) == 1e-5
    assert logits.tolerance(torch.float32, 2) == 3e-5
    assert logits.tolerance(torch.float32, 32) == pytest.approx(6e-5)


def test_a_proof_by_bytes_alone_says_so_as_does_all_that_is_made_of_it(maker, tmp_path, monkeypatch):
    """Logits are not compared; coverage and the Merkle root are."""
    monkeypatch.chdir(tmp_path)
    whole, source = Path("data/models/raw/m-megatron"), maker.hf()
    whole.parent.mkdir(parents=True)
    made(whole, "megatron", lambda folder: folders.convert(source, folder))
    proof = Path(layout.parse(whole).proof)

    found = parity.prove_converted(source, whole, proof, by="bytes")

    assert (found["proof"], found["logits"], found["layers"], found["passed"]) == ("bytes", [], [], True)
    assert found["merkle_root"] == files.read_manifest(source)["facts"]["merkle"]
    assert files.stamp(whole) == {"proof": "bytes"}
    cut = made(tmp_path / "cut", "sharded", lambda folder: folders.shard(whole, folder, Grid(2, 1)))
    assert files.read_manifest(cut)["facts"]["proof"] == "bytes"
    by_logits = parity.prove_converted(source, cut, tmp_path / "cut.json")
    assert by_logits["logits"]
    assert by_logits["proof"] == "bytes"  # what it was made of was not computed with

    parity.prove_converted(source, whole, proof)
    assert files.stamp(whole) == {}
    facts = files.read_manifest(whole)["facts"] | {"merkle": "0" * 64}
    (whole / "plait.json").unlink()
    files.write_manifest(whole, kind="megatron", settings={}, facts=facts)
    monkeypatch.setattr(parity.leaves, "root", lambda _: "0" * 64)
    with pytest.raises(ProofError, match="merkle root"):
        parity.prove_converted(source, whole, proof, by="bytes")
