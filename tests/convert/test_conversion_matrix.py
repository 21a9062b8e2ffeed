"""Every family by every layout and grid: one root, equal bytes whatever the way, and its config as it was."""

import json
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from strategies import SCALED, STRETCHED, spec_of, weights

from plait import files
from plait.cli.main import main
from plait.convert import checkpoint, folders
from plait.models.weights import FolderTensors, merkle
from plait.parallel.grid import Grid

SIZES = {"num_key_value_heads": 4, "num_attention_heads": 8, "intermediate_size": 32, "vocab_size": 300}
FAMILIES = {
    "mistral": {},
    "llama, tied": {"architecture": "LlamaForCausalLM", "tied": True},
    "qwen2": {"attention_bias": True},
    "qwen2, tied": {"attention_bias": True, "tied": True},
    "qwen3": {"qk_norm": True},
    "solo": {"patch_dim": 12},
}
"""Families by their tensors."""
ALIKE = {
    "llama 2": {"architecture": "LlamaForCausalLM"},
    "llama 3": {"rope": SCALED},
    "llama 3, tied": {"rope": SCALED, "tied": True},
    "llama, stretched": {"rope": STRETCHED},
    "mistral v0.1": {"sliding_window": 8},
}
"""Those that have the tensors of one of these, and another config."""
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
SEEING = {
    "clip": ("Qwen3", {"head_dim": 12}),
    "siglip": ("Mixtral", {"num_local_experts": 4}),
}
EVEN = [Grid(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4)]
UNEVEN = [Grid(1, 2, first=1), Grid(2, 3, last=2), Grid(4, 3, first=1, last=2)]
NEXT = {1: 2, 2: 4, 4: 1, 3: 2}
"""Another size, so that each grid leads to one that has no size in common with it."""
FEW = [Grid(1, 1), Grid(2, 2), Grid(4, 4), Grid(1, 2, first=1)]
WHOLLY = {"mistral", "qwen2, tied"}


def cases(names):
    """Each on every grid: all of them in the long run, those of some on few grids in the short one."""
    for name, grid in product(names, EVEN + UNEVEN):
        is_long = name not in WHOLLY and grid not in FEW
        yield pytest.param(name, grid, marks=pytest.mark.long if is_long else (), id=f"{name}-{grid}")


def folder_of(spec, root):
    """A Hugging Face folder of random weights, with a config of transformers 5."""
    root.mkdir()
    spec = replace(spec, dtype="bfloat16")
    (root / "config.json").write_text(json.dumps(spec.config))
    save_file(weights(spec, 5, torch.bfloat16), root / "model.safetensors", metadata={"format": "pt"})
    return root


def contents(folder):
    """Every file's digest."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): files.digest(path) for path in paths}


def goes_round(source, here, grid, *, ep=1, chunks=1):
    """To a grid, to torch_dist, to another grid, and back."""
    other = Grid(NEXT[grid.tp], NEXT[grid.pp])
    dealt = NEXT[ep] if ep > 1 else 1
    ways = {
        "first": (source, grid, {"to": "classic", "ep": ep}),
        "flat": (here / "first", Grid(), {"to": "torch_dist"}),
        "second": (here / "flat", other, {"to": "classic", "ep": dealt, "chunks": chunks}),
        "straight": (source, other, {"to": "classic", "ep": dealt, "chunks": chunks}),
        "back": (here / "second", Grid(), {"to": "hf"}),
    }
    roots = set()
    for name, (start, size, keys) in ways.items():
        (here / name).mkdir()
        roots.add(folders.remake(start, here / name, size, **keys)["merkle"])

    assert roots == {merkle(FolderTensors(source))}
    assert contents(here / "second") == contents(here / "straight")
    for name in ("config.json", "model.safetensors"):
        assert (here / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(("family", "grid"), [*cases(FAMILIES), *product(ALIKE, [Grid(2, 2)])], ids=str)
def test_a_family_goes_through_every_layout_and_grid(family, grid, tmp_path):
    source = folder_of(spec_of(**SIZES, **(FAMILIES | ALIKE)[family]), tmp_path / "hf")
    goes_round(source, tmp_path, grid, chunks=2 if NEXT[grid.pp] == 2 else 1)


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("grid", EVEN + UNEVEN, ids=str)
def test_experts_go_through_every_layout_and_grid(grid, ep, tmp_path):
    source = folder_of(spec_of(**SIZES, **EXPERTS), tmp_path / "hf")
    goes_round(source, tmp_path, grid, ep=ep, chunks=2 if NEXT[grid.pp] == 2 else 1)


@pytest.mark.parametrize(("tower", "grid"), cases(SEEING))
def test_a_llava_goes_through_every_layout_and_grid(maker, tower, grid, tmp_path):
    kind, keys = SEEING[tower]
    base = maker.foreign(kind, name="-matrix", num_key_value_heads=4, **keys)
    source = maker.llava(f"matrix-{tower}", base=base, tower=maker.tower(tower))
    goes_round(source, tmp_path, grid, ep=2 if kind == "Mixtral" else 1)


@pytest.mark.parametrize(("kind", "grid"), cases(["Qwen2", "Llama"]))
def test_a_tied_llava_goes_through_every_layout_and_grid(maker, kind, grid, tmp_path):
    source = maker.tied_llava(kind, name="-matrix", num_key_value_heads=4)
    goes_round(source, tmp_path, grid)


def test_a_config_of_transformers_4_comes_back_as_it_was_or_is_refused_by_the_field(tmp_path, capsys):
    source = folder_of(spec_of(**SIZES, **ALIKE["llama 3"]), tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (source / "config.json").write_text(json.dumps({**config, **old, "pretraining_tp": 1}, indent=3))
    goes_round(source, tmp_path, Grid(2, 2))

    (source / "config.json").write_text(json.dumps({**config, **old, "logit_softcap": 30.0}))
    assert main(["convert", str(source), f"{tmp_path}/out/x"]) == 2
    assert "has logit_softcap, which plait does not know" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


TOWER = "vision_model.decoder.layers.1."
QKV, FC1 = "self_attention.linear_qkv.", "mlp.linear_fc1."
NAMES = {
    ("dense", "te"): {QKV + "layer_norm_weight", FC1 + "layer_norm_weight", FC1 + "weight"},
    ("experts", "te"): {
        QKV + "layer_norm_weight", "pre_mlp_layernorm.weight",
        *(f"mlp.experts.local_experts.{n}.linear_fc{m}.weight" for n in range(2) for m in (1, 2)),
    },
    ("experts", "te-grouped"): {
        QKV + "layer_norm_weight", "pre_mlp_layernorm.weight",
        *(f"mlp.experts.linear_fc{m}.weight{n}" for n in range(2) for m in (1, 2)),
    },
    ("llava", "te"): {
        QKV + "layer_norm_weight", TOWER + QKV + "layer_norm_bias", TOWER + FC1 + "layer_norm_weight",
    },
}  # fmt: skip
"""By model and names: some of those of a layer, which are none of Megatron Core's own layers."""


@pytest.mark.parametrize(("kind", "layers"), NAMES)
def test_transformer_engines_names_are_written_and_read(maker, kind, layers, tmp_path):
    keys = {"dense": {}, "experts": EXPERTS}
    source = maker.llava() if kind == "llava" else folder_of(spec_of(**SIZES, **keys[kind]), tmp_path / "hf")
    sizes = ["--tp=2", "--pp=2", *(["--ep=2"] if kind == "experts" else [])]
    assert main(["convert", str(source), f"{tmp_path}/x", f"--names={layers}", *sizes]) == 0
    assert main(["convert", f"{tmp_path}/x", f"{tmp_path}/back", "--to=hf"]) == 0
    assert main(["convert", f"{tmp_path}/x", f"{tmp_path}/own", *sizes]) == 0
    assert main(["convert", str(source), f"{tmp_path}/straight", *sizes]) == 0

    for path in (tmp_path / "x").rglob(checkpoint.FILE):
        content = torch.load(path, weights_only=False)
        wanted = {
            name if name.startswith(TOWER) else f"decoder.layers.1.{name}" for name in NAMES[kind, layers]
        }
        found = {name.removeprefix("language_model.") for name in content["model"]}
        assert {name for name in wanted if "_000" in path.parent.name or TOWER not in name} <= found
        assert not any("input_layernorm" in name for name in found)
        assert content["args"].transformer_impl == "transformer_engine"
        assert content["args"].moe_grouped_gemm == (layers == "te-grouped")
    back = (tmp_path / "back/model.safetensors").read_bytes()
    assert back == (source / "model.safetensors").read_bytes()
    assert contents(tmp_path / "own") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--optim"], "--names te was given with --optim, which is written by Megatron Core's own names"),
        (["--to=hf"], "--names says nothing of a hf target"),
        (["--to=torch_dist"], "--names says nothing of a torch_dist target"),
    ],
)
def test_names_of_what_has_none_are_refused(words, sentence, tmp_path, capsys):
    assert main(["convert", "x", f"{tmp_path}/y", "--names=te", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_root_of_a_way_in_steps_is_that_of_the_straight_one(maker, tmp_path, capsys):
    """HF -> tp4 is HF -> tp1 -> tp2 -> tp4 and its source, in one printed line each; so are its files."""
    source = maker.hf("matrix", num_key_value_heads=4)
    ways = {"straight": (source, 4), "one": (source, 1), "two": ("one", 2), "four": ("two", 4)}
    for name, (start, tp) in ways.items():
        assert main(["convert", str(tmp_path / start), f"{tmp_path}/{name}", "--tp", str(tp)]) == 0

    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    roots = {re.fullmatch(r".*: 39 tensors; merkle ([0-9a-f]{64})", line)[1] for line in said}
    assert roots == {files.read_manifest(source)["facts"]["merkle"]}
    assert {files.read_manifest(tmp_path / name)["facts"]["merkle"] for name in ways} == roots
    assert contents(tmp_path / "four") == contents(tmp_path / "straight")
    assert len(list((tmp_path / "four").rglob(checkpoint.FILE))) == 4
