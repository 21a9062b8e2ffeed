"""Against Megatron Core itself: names, shapes, torch_dist checkpoints, and what the model computes."""

import pytest
import torch
from makers import save
from megatron.core import parallel_state as ps

from plait import files
from plait.cli.main import main
from plait.convert import checkpoint, engine, folders, layouts, stream, torch_dist
from plait.convert.carried import carry
from plait.convert.export import export_folder
from plait.errors import CheckpointError
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid
from plait.train.build import build_model
from plait.verify import logits, parity
from plait.verify.ranks import run_ranks

GRIDS = [Grid(1, 1), Grid(2, 1), Grid(1, 2)]


def names_and_shapes(spec, grid):
    state = build_model(spec, grid, dtype=torch.float32).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", ["hf", "solo", "llava", "mixtral"])
def test_a_rank_holds_the_names_and_shapes_of_megatrons_model(maker, grid, kind):
    spec = Spec.of(getattr(maker, kind)())
    ranks = run_ranks(names_and_shapes, grid, spec, grid)

    for rank, (tp, pp) in enumerate(grid):
        theirs = {name: shape for name, shape in ranks[rank].items() if not name.endswith("_extra_state")}
        assert engine.rank_shapes(spec, grid, tp, pp) == theirs


@pytest.fixture(scope="module")
def iteration(maker, tmp_path_factory):
    """Saves a model's shards as Megatron Core's trainer does."""
    root = tmp_path_factory.mktemp("runs")

    def make(hf, grid):
        target = root / f"{hf.name}-{grid.tp}-{grid.pp}" / "iter_0000007"
        if not target.exists():
            target.mkdir(parents=True)
            shards = maker.shards(hf, grid.tp, grid.pp)
            run_ranks(save, grid, shards, grid, target)
            carry(shards, target)
        return target

    return make


@pytest.mark.parametrize("kind", ["solo", "llava"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_torch_dist_checkpoint_of_any_grid_has_the_root_of_its_source(maker, iteration, grid, kind):
    hf = getattr(maker, kind)()

    facts = layouts.facts_of_iteration(iteration(hf, grid), Spec.of(hf), grid)

    assert facts["merkle"] == files.read_manifest(hf)["facts"]["merkle"]
    assert facts["coverage"]["written_once"]


def test_a_trained_checkpoint_of_four_ranks_goes_straight_to_one_and_to_hugging_face(
    maker, iteration, tmp_path
):
    hf = maker.hf()
    run = iteration(hf, Grid(2, 2)).parent

    for name, words in {"one": [], "back": ["--to=hf", f"--hf={hf}"]}.items():
        assert main(["convert", str(run), f"{tmp_path}/{name}", "--step=7", *words]) == 0
    assert main(["convert", str(hf), f"{tmp_path}/straight"]) == 0

    one, straight = (tmp_path / name / "release/mp_rank_00" / checkpoint.FILE for name in ("one", "straight"))
    assert one.read_bytes() == straight.read_bytes()
    back = tmp_path / "back/model.safetensors"
    assert back.read_bytes() == (hf / "model.safetensors").read_bytes()


def test_a_chunk_that_is_missing_or_there_twice_is_found(maker, iteration):
    hf = maker.solo()
    placed = torch_dist.sources(iteration(hf, Grid(2, 1)), Spec.of(hf))
    shapes = Spec.of(hf).shapes
    for changed in ([*placed, placed[3]], placed[:3] + placed[4:]):
        with pytest.raises(CheckpointError, match=r"lost or written twice|in no row"):
            stream.Model(changed, shapes)
    assert stream.Model(placed, shapes)


def test_a_checkpoint_of_another_model_is_refused_by_name(maker, iteration):
    folder = iteration(maker.solo(), Grid(2, 1))
    with pytest.raises(CheckpointError, match=r"has vision_patch.weight, which a MistralForCausalLM has not"):
        torch_dist.sources(folder, Spec.of(maker.hf()))
    folder = iteration(maker.hf(), Grid(1, 2))
    with pytest.raises(CheckpointError, match=r"has no tensor vision_patch.weight"):
        torch_dist.sources(folder, Spec.of(maker.solo()))


# Export


def exported(hf, folder, target, template=None):
    target.mkdir()
    facts = export_folder(hf, folder, target, recipe="chat", chat_template=template)
    return target, facts


def test_an_export_before_training_is_its_source_bit_for_bit(maker, iteration, tmp_path):
    hf = maker.solo()

    export, facts = exported(hf, iteration(hf, Grid(2, 1)), tmp_path / "x")

    assert facts["merkle"] == files.read_manifest(hf)["facts"]["merkle"]
    assert (export / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    kept = {path.name for path in hf.iterdir()} - {"plait.json"}
    assert {path.name for path in export.iterdir()} == kept | {"README.md", "tensors.json"}
    assert all((export / name).read_bytes() == (hf / name).read_bytes() for name in kept)
    card = (export / "README.md").read_text()
    assert "iteration 7" in card
    assert "trust_remote_code=True" in card


def test_an_export_carries_the_template_of_training(maker, iteration, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = maker.hf()
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"

    export, _ = exported(hf, iteration(hf, Grid(1, 2)), tmp_path / "x", template)

    chat = [{"role": "user", "content": "hello"}]
    assert AutoTokenizer.from_pretrained(export).apply_chat_template(chat, tokenize=False) == "[user] hello"
    model, report = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


def test_an_export_from_the_wrong_source_is_refused(maker, iteration, tmp_path):
    with pytest.raises(CheckpointError, match=r"their config.json differ"):
        exported(maker.hf(), iteration(maker.solo(), Grid(2, 1)), tmp_path / "x")


# What the model computes


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["mqa", "gqa", "mha"])
def test_seed_6_query_groups_stand_where_attention_looks_for_them(maker, groups):
    """A scrambled qkv survives every round trip; only the model's own numbers show it."""
    hf = maker.hf(f"g{groups}", num_key_value_heads=groups)
    spec, grid = Spec.of(hf), Grid(tp=2 if groups > 1 else 1)

    rows = parity.computed(hf, spec, grid.tp, parity.Sharded(maker.shards(hf, grid.tp, 1), spec, grid))

    assert not logits.failures(**rows), rows


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 2)], ids=str)
def test_a_mixture_of_experts_computes_what_transformers_does(maker, grid):
    hf = maker.mixtral("wide", initializer_range=0.2)
    spec, folder = Spec.of(hf), maker.shards(hf, grid.tp, grid.pp)

    rows = parity.computed(hf, spec, grid.tp, parity.Sharded(folder, spec, grid))

    assert not logits.failures(**rows), rows


def test_experts_in_each_others_place_are_found_by_the_logits(maker):
    """Names and shapes of experts are alike: only the model's own numbers tell them apart."""
    hf = maker.mixtral("wide", initializer_range=0.2)
    spec, folder = Spec.of(hf), maker.shards(hf, 1, 1)

    def load(stage, layer):
        parity.Sharded(folder, spec, Grid())(stage, layer)
        if layer == 2:
            one, other = (stage.decoder.layers[0].mlp.experts.local_experts[n].linear_fc2 for n in (0, 1))
            one.weight, other.weight = other.weight, one.weight

    rows = parity.computed(hf, spec, 1, load)
    assert logits.failures(**rows)[0].startswith("layer 2: ")


def test_a_mixture_of_experts_exports_as_it_came(maker, iteration, tmp_path):
    hf = maker.mixtral()

    export, _ = exported(hf, iteration(hf, Grid(2, 1)), tmp_path / "x")

    assert (export / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_seed_2_the_vocabulary_is_the_tokenizers_whatever_its_size(maker):
    from transformers import AutoTokenizer

    for hf in (maker.hf(), maker.solo()):
        size = len(AutoTokenizer.from_pretrained(hf))
        spec = Spec.of(hf)
        assert spec.vocab_size == size == len(FolderTensors(hf)["lm_head.weight"])
        back = stream.View(layouts.released(maker.shards(hf, 2, 1), spec))
        assert len(back["model.embed_tokens.weight"]) == len(back["lm_head.weight"]) == size


def loaded(spec, grid, folder, shards):
    """Whether Megatron's own reader gives this rank what its shard has."""

    from plait.train.state import load_model

    model = build_model(spec, grid, dtype=torch.float32)
    load_model([model], folder)
    place = ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank()
    expected = checkpoint.read_rank(shards, grid, *place)
    found = model.state_dict()
    return all(torch.equal(found[name], expected[name]) for name in expected), len(expected)


@pytest.mark.parametrize("kind", ["solo", "llava", "mixtral", "tied", "tied_llava"])
@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2)], ids=str)
def test_a_torch_dist_checkpoint_that_is_written_here_is_read_by_megatron(maker, kind, grid, tmp_path):
    hf = maker.foreign("Qwen2", tied=True) if kind == "tied" else getattr(maker, kind)()
    spec, folder = Spec.of(hf), tmp_path / "iter_0000001"
    folder.mkdir()
    facts = folders.remake(hf, folder, Grid(), to="torch_dist")

    equal = run_ranks(loaded, grid, spec, grid, folder, maker.shards(hf, grid.tp, grid.pp))

    assert all(same and count for same, count in equal)
    assert layouts.opened(folder)[1].stream() == layouts.of_hf(hf, spec).stream()
    assert facts["merkle"] == files.read_manifest(hf)["facts"]["merkle"]
