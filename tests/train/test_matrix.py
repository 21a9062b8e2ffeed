"""Each recipe, spread in every way that planning accepts, trains as one process does.

fp32, 20 iterations. Losses differ by at most 1e-5, or 1e-5 of the loss where that is less; gradients of the
first and of the last iteration, whole and by Hugging Face's names, by at most 1e-5 of the largest.
"""

from functools import cache, partial

import pytest
from makers import Maker
from spread import SEEN, Way, plainly, recipes

from plait.train import build

TP, PP, CP, DP = (f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context", "data"))
VPP, EP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size"
SEQUENCE = {TP: 2, "sequence_parallel": True}
SHARED = {"use_distributed_optimizer": True}
EARLY = {"overlap_grad_reduce": True}
GATHERED = {**SHARED, **EARLY, "overlap_param_gather": True}
AGAIN = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WAYS = {
    "tensor": {TP: 2},
    "pipeline": {PP: 2},
    "pipeline of four": {PP: 4},
    "tensor x pipeline": {TP: 2, PP: 2},
    "data": {DP: 2},
    "data x tensor": {DP: 2, TP: 2},
    "data x pipeline": {DP: 2, PP: 2},
    "sequence": SEQUENCE,
    "sequence x pipeline": {**SEQUENCE, PP: 2},
    "context": {CP: 2},
    "context x tensor": {CP: 2, TP: 2},
    "context x sequence": {CP: 2, **SEQUENCE},
    "context x pipeline": {CP: 2, PP: 2},
    "context x data": {CP: 2, DP: 2},
    "distributed optimizer": {DP: 2, **SHARED},
    "distributed optimizer x tensor": {DP: 2, TP: 2, **SHARED},
    "distributed optimizer x sequence": {DP: 2, **SEQUENCE, **SHARED},
    "distributed optimizer x pipeline": {DP: 2, PP: 2, **SHARED},
    "distributed optimizer x context": {CP: 2, **SHARED},
    "gradients early": {DP: 2, **EARLY},
    "gradients early x pipeline": {DP: 2, PP: 2, **EARLY},
    "weights gathered late": {DP: 2, **GATHERED},
    "weights gathered late x pipeline": {DP: 2, PP: 2, **GATHERED},
    "attention again": {"recompute_granularity": "selective"},
    "layers again": AGAIN,
    "layers again x sequence": {**SEQUENCE, **AGAIN},
    "layers again x context": {CP: 2, **AGAIN},
    "a block again x pipeline": {PP: 2, **AGAIN, "recompute_method": "block"},
    "interleaved": {PP: 2, VPP: 2},
    "interleaved x tensor": {PP: 2, VPP: 2, TP: 2},
    "interleaved x sequence": {PP: 2, VPP: 2, **SEQUENCE},
    "interleaved x context": {PP: 2, VPP: 2, CP: 2},
    "interleaved x data": {PP: 2, VPP: 2, DP: 2},
    "interleaved x distributed optimizer": {PP: 2, VPP: 2, DP: 2, **SHARED},
    "interleaved x gradients early": {PP: 2, VPP: 2, DP: 2, **EARLY},
    "interleaved x weights gathered late": {PP: 2, VPP: 2, DP: 2, **GATHERED},
    "interleaved x layers again": {PP: 2, VPP: 2, **AGAIN},
    "interleaved x attention again": {PP: 2, VPP: 2, "recompute_granularity": "selective"},
}  # fmt: skip
RECIPES = ("chat", "solo", "llava")
SHORT = {("chat", "tensor x pipeline"), ("chat", "interleaved")}
"""What every run of the tests tries; the rest takes minutes."""
CLOSE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return recipes(Maker(tmp_path_factory.mktemp("made")))


@pytest.fixture(scope="module")
def single(made, tmp_path_factory):
    """A recipe by one process; each is trained once."""

    @cache
    def run(recipe, *frozen):
        return made[recipe].run(Way({"freeze": frozen}), tmp_path_factory.mktemp(recipe))

    return run


def agree(found, wanted):
    """Losses and gradients of two runs."""
    for step, (ours, theirs) in enumerate(zip(found.losses, wanted.losses, strict=True), start=1):
        assert abs(ours - theirs) <= CLOSE * min(1.0, theirs), f"loss of iteration {step}"
    for step in SEEN:
        ours, theirs = found.gradients[step], wanted.gradients[step]
        largest = max(one.abs().max() for one in theirs.values())
        assert ours.keys() == theirs.keys()
        for name, one in theirs.items():
            assert (ours[name] - one).abs().max() <= CLOSE * largest, f"{name} of iteration {step}"


@pytest.mark.parametrize(
    ("recipe", "frozen"),
    [
        ("chat", ()),
        pytest.param("solo", (), marks=pytest.mark.long),
        pytest.param("llava", ("vision_model", "vision_tower"), marks=pytest.mark.long),
    ],
)
def test_one_process_is_a_plain_loop_over_transformers(recipe, frozen, made, single):
    found, wanted = single(recipe, *frozen[:1]), plainly(made[recipe], frozen)
    trained = {
        step: {name: one for name, one in found.gradients[step].items() if name in wanted.gradients[step]}
        for step in SEEN
    }
    agree(found._replace(gradients=trained), wanted)
    assert max((found.weights[name] - one).abs().max() for name, one in wanted.weights.items()) < 1e-4


def pairs():
    for recipe in RECIPES:
        for name in WAYS:
            marks = () if (recipe, name) in SHORT else pytest.mark.long
            yield pytest.param(recipe, name, marks=marks, id=f"{recipe} {name}")


@pytest.mark.parametrize(("recipe", "name"), pairs())
def test_a_run_spread_in_any_way_is_that_of_one_process(recipe, name, made, single, tmp_path):
    wanted = single(recipe)
    assert wanted.losses[-1] < wanted.losses[0] - 0.3
    agree(made[recipe].run(Way(WAYS[name]), tmp_path), wanted)


FROZEN = {
    "projector only": ("language_model", "vision_model"),
    "tower frozen": ("vision_model",),
    "tower only": ("language_model", "vision_projection"),
}
WITH_FROZEN = (
    "pipeline", "sequence", "context", "layers again", "distributed optimizer x pipeline", "gradients early",
    "weights gathered late x pipeline", "interleaved", "interleaved x distributed optimizer",
    "interleaved x weights gathered late",
)  # fmt: skip
"""Ways in which a rank, or a chunk of it, may have nothing to train."""


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_FROZEN)
@pytest.mark.parametrize("parts", FROZEN)
def test_so_is_one_with_frozen_parts(parts, name, made, single, tmp_path):
    way = Way({**WAYS[name], "freeze": FROZEN[parts]})
    agree(made["llava"].run(way, tmp_path), single("llava", *FROZEN[parts]))


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["solo", "llava"])
@pytest.mark.parametrize("name", ["gradients early", "weights gathered late"])
def test_copies_that_see_different_pictures_share_weights_in_many_pieces(
    name, recipe, made, single, tmp_path, monkeypatch
):
    """As a large model's are: a piece that only one copy asked for would never come."""
    pieces = partial(build.DistributedDataParallelConfig, bucket_size=2000)
    monkeypatch.setattr(build, "DistributedDataParallelConfig", pieces)
    agree(made[recipe].run(Way(WAYS[name]), tmp_path), single(recipe))
