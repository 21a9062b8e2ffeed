"""The tables' names, shapes and grids against Megatron Core's own LLaVA, and uneven pipelines."""

import pytest
import torch

from plait.convert import engine, forms
from plait.errors import CheckpointError, ConfigError
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks


def megatrons_own(spec):
    """Names and shapes of megatron.core's LLaVAModel with a CLIP tower of this size."""
    import megatron.core.models.multimodal.llava_model as llava
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    from plait.train.build import transformer_config
    from plait.train.llava import projector_sizes, tower_sizes

    class Norm:  # without Transformer Engine, mcore's default norm takes no config
        def __new__(cls, config, hidden_size, eps=1e-5):
            return torch.nn.LayerNorm(hidden_size, eps=eps)

    class Clip(llava.CLIPViTModel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"ln_pre_impl": Norm, "ln_post_impl": Norm, **kwargs})

    llava.CLIPViTModel = Clip
    grid, tower = Grid(), spec.vision
    make = lambda **sizes: transformer_config(spec, grid, dtype=torch.float32, **sizes)  # noqa: E731
    vision = make(**tower_sizes(tower))
    vision.vision_model_type = "clip"
    model = llava.LLaVAModel(
        make(),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        384,
        64,
        vision,
        get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=make(**projector_sizes(spec.projector, spec.num_attention_heads)),
        vision_projection_layer_spec=MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
        ),
        vision_projection_type="mlp",
        language_position_embedding_type="rope",
        img_h=tower.image_size,
        img_w=tower.image_size,
        patch_dim=tower.patch_size,
        image_token_index=spec.image_token_id,
    )
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if "_extra" not in name}


def test_names_and_shapes_are_those_of_megatrons_own_llava(maker):
    square = maker.tower(
        "clip-square", image_size=32
    )  # mcore refuses a side that is no multiple of the patch
    spec = Spec.of(maker.llava("square", tower=square))
    (theirs,) = run_ranks(megatrons_own, Grid(), spec)
    assert engine.rank_shapes(spec, Grid()) == theirs


def test_the_towers_qkv_is_laid_out_head_by_head(maker):
    source = maker.llava()
    spec, hf = Spec.of(source), FolderTensors(source)
    below = "vision_tower.vision_model.encoder.layers.1.self_attn."
    for part in ("weight", "bias"):
        q, k, v = (hf[f"{below}{name}_proj.{part}"] for name in "qkv")
        heads = []
        for head in range(4):
            rows = slice(head * 4, head * 4 + 4)
            heads += [q[rows], k[rows], v[rows]]
        name = f"vision_model.decoder.layers.1.self_attention.linear_qkv.{part}"
        assert torch.equal(engine.to_mcore(hf, spec)[name], torch.cat(heads))


@pytest.mark.parametrize(
    "grid", [Grid(2, 1), Grid(1, 2), Grid(2, 2), Grid(1, 2, first=1), Grid(2, 3, last=2)], ids=str
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_coverage_holds_on_every_grid(maker, kind, grid):
    source = maker.llava() if kind == "clip" else maker.llava("siglip", tower=maker.tower("siglip"))
    spec = Spec.of(source)
    found = forms.coverage(spec, grid)
    assert found["hf_tensors"] + found["carried_tensors"] == len(spec.shapes)
    total = sum(torch.Size(shape).numel() for shape in spec.shapes.values())
    assert found["hf_elements"] + found["carried_elements"] == total


def test_the_tower_stands_on_the_first_stage_only(maker):
    spec = Spec.of(maker.llava())
    first, last = (engine.rank_shapes(spec, Grid(1, 2, first=1), 0, stage) for stage in (0, 1))
    assert {name.partition(".")[0] for name in first} == {
        "language_model",
        "vision_model",
        "vision_projection",
    }
    assert {name.partition(".")[0] for name in last} == {"language_model"}
    layers = [{name.split(".")[3] for name in part if ".decoder.layers." in name} for part in (last,)]
    assert layers == [{"0", "1", "2"}]


def test_an_unknown_tensor_of_the_folder_is_named(maker, tmp_path):
    from safetensors.torch import load_file, save_file

    from plait.convert import folders

    source = maker.llava()
    (tmp_path / "hf").mkdir()
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["vision_tower.vision_model.extra.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has unknown vision_tower.vision_model.extra.weight"):
        folders.convert(tmp_path / "hf", tmp_path)


@pytest.mark.parametrize(
    ("grid", "layers", "sizes"),
    [
        (Grid(pp=2, first=1), 4, [1, 3]),
        (Grid(pp=2, last=1), 4, [3, 1]),
        (Grid(pp=4, first=2, last=2), 12, [2, 4, 4, 2]),
        (Grid(pp=2, first=1, last=3), 4, [1, 3]),
        (Grid(pp=1, first=1), 4, [4]),
    ],
    ids=str,
)
def test_uneven_stages_follow_megatrons_rule(grid, layers, sizes):
    stages = [grid.layers(stage, num_layers=layers) for stage in range(grid.pp)]
    assert [len(stage) for stage in stages] == sizes
    assert [n for stage in stages for n in stage] == list(range(layers))
    assert all(n in stages[grid.stage_of(n, num_layers=layers)] for n in range(layers))
    assert Grid(**grid.facts) == grid


@pytest.mark.parametrize(
    "grid", [Grid(pp=3, first=1), Grid(pp=2, first=4), Grid(pp=2, first=1, last=1)], ids=str
)
def test_uneven_stages_that_do_not_add_up_are_refused(grid):
    with pytest.raises(ConfigError, match="do not divide among the other"):
        grid.layers(0, num_layers=4)
