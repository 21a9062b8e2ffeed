"""`plait convert --optim`: what Megatron's own optimizer reads of it, and how training goes on from there."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from makers import Maker
from test_experts import on_the_hub
from test_loop import AROUND, RUN, SIZES, STEPS, feed, model, plain  # noqa: F401 - two are fixtures
from test_resume import segment
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from plait.cli.main import main
from plait.convert import checkpoint, forms, moments, optimizer, torch_dist
from plait.convert.carried import carry
from plait.convert.forms import Place
from plait.convert.torch_dist import STATE
from plait.files import read_manifest
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train.build import (
    DTYPES,
    build_chunks,
    build_model,
    freeze,
    load_weights,
    optimizer_of,
    schedule_of,
    wrap,
)
from plait.train.state import RATES, SHARDING, TrainState
from plait.verify.ranks import run_ranks

HALF = 3
BF16, DISTRIBUTED = {"params_dtype": "bf16"}, {"use_distributed_optimizer": True}
WAYS = {
    "bf16": (BF16, Grid(2, 1), 1),
    "fp32": ({}, Grid(2, 1), 1),
    "bf16, on four": (BF16, Grid(2, 2), 1),
    "bf16, distributed": (BF16 | DISTRIBUTED, Grid(1, 1), 2),
    "fp32, distributed": (DISTRIBUTED, Grid(1, 1), 2),
}
EXPERTS = {
    "experts": (BF16, Grid(2, 1), 1),
    "experts, fp32": ({}, Grid(1, 2), 1),
    "experts, distributed": (BF16 | DISTRIBUTED, Grid(1, 1), 2),
}
TIED = {"tied": (BF16, Grid(2, 1), 1), "tied, on two": (BF16, Grid(1, 2), 1)}
DENSE, WAYS = [*WAYS], WAYS | EXPERTS | TIED
"""A run's keys, its grid, its copies."""


def place():
    from megatron.core import parallel_state as ps

    return ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank()


def rank_of(config, grid, keys, *, one_optimizer):
    """A rank's model, whose weights are nonsense, with optimizer and schedule."""
    run = RUN | keys
    dtype = DTYPES[run.get("params_dtype", "fp32")]
    inner = build_model(Spec.from_config(config), grid, dtype=dtype, run=run)
    for parameter in inner.parameters():
        parameter.data.fill_(float("nan"))
        if one_optimizer:  # of experts that are not dealt out too, as Megatron-LM has it
            parameter.allreduce = True
    wrapped = wrap([inner], run)
    own = optimizer_of(wrapped, run)
    state = TrainState([inner], own, schedule_of(own, run, train_iters=STEPS, sequence=24))
    return inner, wrapped, state, run


def held(own, parameters):
    """Masters and moments by the names of parameters, of optimizers of one copy, distributed or not."""
    found = {}
    for name, one in parameters:
        for inner in own.chained_optimizers:
            main_copy = getattr(one, "main_param", one)
            if one in getattr(inner, "model_param_group_index_map", ()):
                found[name] = dict(inner._get_main_param_and_optimizer_states(one))
            elif main_copy in inner.optimizer.state:
                found[name] = {"param": main_copy, **inner.optimizer.state[main_copy]}
        found[name] = {kind: state.detach().reshape(one.shape) for kind, state in found[name].items()}
    return found


def go_on(config, grid, keys, before, there, classic, trains):
    """Load a checkpoint by Megatron's means; write down what it holds, as Megatron-LM does; train on."""
    from megatron.core import parallel_state as ps

    from plait.train.loop import Trainer

    ep = ps.get_expert_model_parallel_world_size()
    inner, wrapped, state, run = rank_of(config, grid, keys, one_optimizer=classic and ep == 1)
    tp, pp = place()
    dealt = ps.get_expert_model_parallel_rank() if ep > 1 else None
    path = before / grid.folder(tp=tp, pp=pp, ep=dealt) / checkpoint.FILE
    if classic:
        content = torch.load(path, weights_only=False)
        load_weights(inner, content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.schedule.load_state_dict(content["opt_param_scheduler"])
        state.iteration = content["iteration"]
    else:
        state.load(before, generators=False)
    args = checkpoint.megatron_args(Spec.from_config(config), grid)
    args.expert_model_parallel_size = ep
    write(there / path.relative_to(before), inner, state, args)
    if trains:
        dp = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
        Trainer(wrapped, state, feed(*dp), run, AROUND).train(STEPS, folder=there)


def write(path, inner, state, args):
    """A rank's file as Megatron-LM writes it, and what the optimizer holds by names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": inner.state_dict_for_save_checkpoint(),
        "optimizer": state.optimizer.state_dict(),
        "opt_param_scheduler": state.schedule.state_dict(),
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": state.iteration,
        "held": held(state.optimizer, [(n, one) for n, one in inner.named_parameters() if one.requires_grad]),
    }
    torch.save(content, path)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["lm loss"] for row in rows if row["iteration"] > HALF]


def differences(one, other, at=""):
    """Where two states are not alike, bit for bit; rates are each run's own."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other} - {"lr", *RATES}, key=str):
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{at}.{key}")
            else:
                yield f"{at}.{key} is in one only"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{at}.{number}")
    elif torch.is_tensor(one) and torch.is_tensor(other):
        if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
            yield at
    elif one != other:
        yield f"{at}: {one!r} and {other!r}"


def unlike(one, other, grid, parts=("model", "optimizer", "iteration"), ep=1):
    """Where the files of ranks are not alike."""
    found = []
    for (tp, pp), number in product(grid, range(ep)):
        name = f"{grid.folder(tp=tp, pp=pp, ep=number if ep > 1 else None)}/{checkpoint.FILE}"
        contents = [torch.load(folder / name, weights_only=False) for folder in (one, other)]
        for content in contents:
            content["model"] = {k: v for k, v in content["model"].items() if v is not None}
        for part in parts:
            found += differences(*(content[part] for content in contents), f"{name}: {part}")
    return found


@pytest.fixture(scope="module")
def world(model, tmp_path_factory):  # noqa: F811
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    experts = MixtralForCausalLM(MixtralConfig(intermediate_size=24, **sizes))
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"tie_word_embeddings": True}
    tied = Qwen2ForCausalLM(Qwen2Config(intermediate_size=48, **sizes))
    models = {"Mistral": model, "Mixtral": experts, "Qwen2": tied}
    return World(models, tmp_path_factory.mktemp("runs"))


class World:
    """Runs up to their middle, and what becomes of them."""

    def __init__(self, models, root):
        self.models, self.root = models, root

    def model(self, way):
        """The config and the weights of a run."""
        kind = "Mixtral" if "experts" in way else "Qwen2" if "tied" in way else "Mistral"
        state = self.models[kind].state_dict()
        config = {**self.models[kind].config.to_dict(), "architectures": [f"{kind}ForCausalLM"]}
        return config, on_the_hub(state) if kind == "Mixtral" else state

    def trained(self, way):
        """A run's folder, with its iteration."""
        keys, grid, copies = WAYS[way]
        run = self.root / way.replace(", ", "-").replace(" ", "-")
        if not run.exists():
            run.mkdir()
            config, weights = self.model(way)
            run_ranks(segment, grid, weights, config, grid, run, 0, HALF, keys, copies=copies)
        return run

    def resharded(self, way, grid, *, trains=True, ep=1):
        """What Megatron itself makes of it on a grid: files of ranks, and the losses of the rest."""
        there = self.trained(way) / f"on-{grid.tp}-{grid.pp}-{ep}-{trains}"
        if not there.exists():
            self.read(iteration(self.trained(way)), there, way, grid, classic=False, trains=trains, ep=ep)
            shutil.copyfile(iteration(self.trained(way)) / HF_CONFIG, there / HF_CONFIG)
        return there

    def read(self, before, there, way, grid, *, classic, trains=True, ep=1):
        """What Megatron holds after it has read a checkpoint, and the losses of the rest."""
        there.mkdir()
        keys = WAYS[way][0] | {"expert_model_parallel_size": ep}
        if classic:  # which has no distributed optimizer
            keys = {key: value for key, value in keys.items() if key not in DISTRIBUTED}
        arguments = self.model(way)[0], grid, keys, before, there, classic, trains
        run_ranks(go_on, grid, *arguments, copies=ep, ep=ep)
        return there


def convert(source, target, *words, grid=None):
    sizes = [f"--tp={grid.tp}", f"--pp={grid.pp}"] if grid else []
    assert main(["convert", str(source), str(target), "--optim", *words, *sizes]) == 0
    return target


def iteration(folder):
    return folder / f"iter_{HALF:07d}"


# The order of parameters


def numbered(specs, grid, chunks):
    """The parameters of each group of Megatron's optimizer, by chunk and name, and ours."""
    theirs, ours = [], []
    keys = {"virtual_pipeline_model_parallel_size": chunks} if chunks > 1 else {}
    for spec in specs:
        inner = build_chunks(spec, grid, dtype=torch.float32, run=keys)
        own = optimizer_of(wrap(inner), RUN)
        names = {
            id(one): (n, name) for n, chunk in enumerate(inner) for name, one in chunk.named_parameters()
        }
        theirs.append([[names[id(one)] for one in group["params"]] for group in own.param_groups])
        tp, pp = place()
        cut = [
            forms.of_rank(spec, grid.interleaved(chunks), Place(tp, n * grid.pp + pp)) for n in range(chunks)
        ]
        form = {(n, name): one for n, chunk in enumerate(cut) for name, one in chunk.items()}
        order = sorted(form, key=lambda one: (one[0], moments.module_order(one[1])))
        ours.append(
            [[n for n in order if moments.decays(n[1], form[n].shape) == some] for some in (True, False)]
        )
    return theirs, ours


@pytest.mark.parametrize(("grid", "chunks"), [(Grid(1, 1), 1), (Grid(1, 2), 1), (Grid(1, 2), 2)], ids=str)
def test_parameters_are_numbered_as_megatrons_optimizer_does(grid, chunks, tmp_path):
    maker = Maker(tmp_path)
    siglip = maker.llava("siglip", tower=maker.tower("siglip"))
    made = [maker.hf(), maker.foreign("Qwen2", tied=True), maker.foreign("Qwen3")]
    made += [maker.solo(), maker.llava(), siglip] if chunks == 1 else []
    world = {"chunks": chunks} if chunks > 1 else {}
    specs = [Spec.of(folder) for folder in made]
    for theirs, ours in run_ranks(numbered, grid, specs, grid, chunks, **world):
        assert theirs == ours


def step_of(made, grid, root, frozen=()):
    """One step of Megatron's optimizer of several models, whose gradients follow from the weights alone.

    So each grid has the same states, whatever becomes of them in files.
    """
    tp, pp = place()
    run = RUN | {"clip_grad": 0.0}
    for shards in made:
        spec = Spec.of(shards, HF_CONFIG)
        inner = build_model(spec, grid, dtype=torch.bfloat16, run=run)
        load_weights(inner, checkpoint.read_rank(shards, grid, tp, pp))
        freeze([inner], frozen)
        own = optimizer_of(wrap([inner], run), run)
        for one in inner.parameters():
            if one.requires_grad:
                one.main_grad.copy_(torch.sin(50 * one.detach().float()))
        own.step()
        state = TrainState([inner], own, schedule_of(own, run, train_iters=STEPS, sequence=24), HALF)
        path = root / shards.name.split("-tp")[0] / grid.folder(tp=tp, pp=pp) / checkpoint.FILE
        write(path, inner, state, checkpoint.megatron_args(spec, grid))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Grid(2, 1), Grid(1, 2)),
        pytest.param(Grid(2, 2, first=1), Grid(2, 1), marks=pytest.mark.long),
        pytest.param(Grid(1, 2), Grid(2, 2, first=1), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_model_goes_from_grid_to_grid_and_back(one, other, tmp_path):
    maker = Maker(tmp_path / "made")
    made = [maker.solo(), maker.llava(), maker.llava("siglip", tower=maker.tower("siglip"))]
    made += [maker.foreign("Qwen2", tied=True), maker.foreign("Qwen3")]
    for grid in (one, other):
        shards = [maker.shards(hf, grid.tp, grid.pp, first=grid.first) for hf in made]
        run_ranks(step_of, grid, shards, grid, tmp_path / str(grid))
        for folder in shards:
            carry(folder, tmp_path / str(grid) / folder.name.split("-tp")[0])
    for hf, (a, b) in product(made, ((one, other), (other, one))):
        first = [f"--first={b.first}"] if b.first else []
        target = convert(tmp_path / str(a) / hf.name, tmp_path / f"{hf.name} on {b}", *first, grid=b)
        assert not unlike(iteration(target), tmp_path / str(b) / hf.name, b)


FROZEN = [
    ("language_model", "vision_model"),
    pytest.param(("vision_model",), marks=pytest.mark.long),
    pytest.param(("vision_model", "vision_projection"), marks=pytest.mark.long),
]


def reads(shards, grid, folder, root, frozen):
    """Whether Megatron's own reader gives this rank's optimizer what it had at first."""
    tp, pp = place()
    spec = Spec.of(shards, HF_CONFIG)
    inner = build_model(spec, grid, dtype=torch.bfloat16, run=RUN)
    freeze([inner], frozen)
    own = optimizer_of(wrap([inner], RUN), RUN)
    state = TrainState([inner], own, schedule_of(own, RUN, train_iters=STEPS, sequence=24))
    state.load(folder, generators=False)
    expected = torch.load(root / grid.folder(tp=tp, pp=pp) / checkpoint.FILE, weights_only=False)
    trained = [(name, one) for name, one in inner.named_parameters() if one.requires_grad]
    return list(differences(held(own, trained), expected["held"]))


@pytest.mark.parametrize("frozen", FROZEN, ids=" and ".join)
def test_a_model_with_frozen_parts_goes_from_grid_to_grid(frozen, tmp_path):
    maker, one, other = Maker(tmp_path / "made"), Grid(2, 1), Grid(1, 2)
    hf = maker.llava()
    for grid in (one, other):
        shards = maker.shards(hf, grid.tp, grid.pp)
        run_ranks(step_of, grid, [shards], grid, tmp_path / str(grid), frozen)
        carry(shards, tmp_path / str(grid) / hf.name)
    first, last = (tmp_path / str(grid) / hf.name for grid in (one, other))

    there = convert(first, tmp_path / "there", grid=other)
    flat = convert(there, tmp_path / "flat", "--to=torch_dist")
    back = convert(flat, tmp_path / "back", grid=one)

    assert read_manifest(flat)["facts"]["optimizer"]["frozen"] == sorted(frozen)
    assert not unlike(iteration(there), last, other)
    assert not unlike(iteration(back), first, one)
    assert run_ranks(reads, other, maker.shards(hf, 1, 2), other, flat, last, frozen) == [[], []]


# What Megatron reads, and how training goes on


@pytest.mark.parametrize(
    ("way", "grid"),
    [
        ("bf16", Grid(1, 2)),
        *(
            pytest.param(way, grid, marks=pytest.mark.long)
            for way in ("bf16", "fp32", "bf16, on four", *TIED)
            for grid in (Grid(1, 1), Grid(1, 2), Grid(2, 2))
            if (way, grid) != ("bf16", Grid(1, 2))
        ),
    ],
    ids=str,
)
def test_a_trained_checkpoint_goes_on_from_the_classic_layout_of_any_grid(world, way, grid, tmp_path, plain):  # noqa: F811
    before = world.trained(way)
    expected = world.resharded(way, grid)

    target = convert(before, tmp_path / "x", f"--step={HALF}", grid=grid)

    assert (target / "latest_checkpointed_iteration.txt").read_text() == str(HALF)
    assert not unlike(iteration(target), expected, grid)
    read = world.read(iteration(target), tmp_path / "read", way, grid, classic=True)
    assert not unlike(read, expected, grid, ("model", "optimizer", "held", "iteration"))
    assert losses(read) == losses(expected)
    assert len(losses(read)) == STEPS - HALF
    if way == "fp32":
        assert losses(read) == pytest.approx(plain[0][HALF:], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 2), Grid(2, 2)], ids=str)
@pytest.mark.parametrize("way", ["bf16, distributed", "fp32, distributed"])
def test_a_distributed_optimizer_goes_on_as_a_plain_one(world, way, grid, tmp_path, plain):  # noqa: F811
    expected = world.resharded(way, grid)  # read by a distributed one: Megatron has no other

    target = convert(world.trained(way), tmp_path / "x", f"--step={HALF}", grid=grid)
    read = world.read(iteration(target), tmp_path / "read", way, grid, classic=True)

    assert not unlike(read, expected, grid, ("model", "held", "iteration"))
    assert losses(read) == pytest.approx(losses(expected), abs=1e-6)
    if "bf16" not in way:
        assert losses(read) == pytest.approx(plain[0][HALF:], abs=1e-4)


@pytest.mark.parametrize(
    ("way", "grid"),
    [
        ("fp32", Grid(1, 2)),
        *(
            pytest.param(way, grid, marks=pytest.mark.long)
            for way in DENSE
            for grid in (Grid(1, 1), Grid(1, 2), Grid(2, 2))
            if (way, grid) != ("fp32", Grid(1, 2))
        ),
    ],
    ids=str,
)
def test_a_torch_dist_checkpoint_that_is_converted_is_resumed_as_it_was(world, way, grid, tmp_path):
    expected = world.resharded(way, grid)

    target = convert(world.trained(way), tmp_path / "x", f"--step={HALF}", "--to=torch_dist")

    read = world.read(target, tmp_path / "read", way, grid, classic=False)
    assert not unlike(read, expected, grid, ("model", "optimizer", "held", "iteration"))
    assert losses(read) == losses(expected)


@pytest.mark.parametrize(
    ("way", "first", "grid"),
    [
        ("bf16", Grid(2, 1), Grid(1, 2)),
        pytest.param("tied", Grid(1, 2), Grid(2, 2), marks=pytest.mark.long),
        pytest.param("tied", Grid(2, 1), Grid(1, 2), marks=pytest.mark.long),
        pytest.param("fp32", Grid(2, 1), Grid(1, 2), marks=pytest.mark.long),
        pytest.param("fp32", Grid(1, 2), Grid(2, 2), marks=pytest.mark.long),
        pytest.param("bf16", Grid(2, 2), Grid(1, 1), marks=pytest.mark.long),
        pytest.param("bf16", Grid(1, 1), Grid(2, 2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_what_megatron_writes_in_the_classic_layout_goes_to_another_grid(world, way, first, grid, tmp_path):
    before = world.resharded(way, first, trains=False)
    expected = world.resharded(way, grid)

    there = convert(before, tmp_path / "there", grid=grid)
    back = convert(there, tmp_path / "back", grid=first)
    stacked = convert(before, tmp_path / "stacked", "--to=torch_dist")
    again = convert(stacked, tmp_path / "again", grid=grid)

    assert not unlike(iteration(there), expected, grid)
    assert not unlike(iteration(back), before, first)
    assert not unlike(iteration(again), expected, grid)
    read = world.read(stacked, tmp_path / "read", way, grid, classic=False)
    assert not unlike(read, expected, grid, ("model", "optimizer", "held", "iteration"))
    assert losses(read) == losses(expected)


@pytest.mark.parametrize(
    ("way", "grid", "ep"),
    [
        ("experts", Grid(), 2),
        pytest.param("experts", Grid(2, 1), 2, marks=pytest.mark.long),
        pytest.param("experts", Grid(1, 2), 4, marks=pytest.mark.long),
        pytest.param("experts, fp32", Grid(1, 2), 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_experts_that_are_dealt_out_have_their_own_optimizer(world, way, grid, ep, tmp_path):
    expected = world.resharded(way, grid, ep=ep)

    target = convert(world.trained(way), tmp_path / "x", f"--step={HALF}", f"--ep={ep}", grid=grid)
    stacked = convert(target, tmp_path / "stacked", "--to=torch_dist")
    again = convert(stacked, tmp_path / "again", f"--ep={ep}", grid=grid)

    assert not unlike(iteration(target), expected, grid, ep=ep)
    assert not unlike(iteration(again), expected, grid, ep=ep)
    read = world.read(iteration(target), tmp_path / "read", way, grid, classic=True, ep=ep)
    assert not unlike(read, expected, grid, ("model", "optimizer", "iteration", "held"), ep)
    assert losses(read) == losses(expected)


@pytest.mark.long
@pytest.mark.parametrize("grid", [Grid(), Grid(2, 2)], ids=str)
@pytest.mark.parametrize("way", EXPERTS)
def test_experts_of_one_rank_share_the_optimizer_of_all_else(world, way, grid, tmp_path):
    expected = world.resharded(way, grid)

    dealt = convert(world.trained(way), tmp_path / "dealt", f"--step={HALF}", "--ep=2", grid=Grid())
    target = convert(dealt, tmp_path / "x", grid=grid)

    read = world.read(iteration(target), tmp_path / "read", way, grid, classic=True)
    assert not unlike(read, expected, grid, ("model", "iteration", "held"))
    assert losses(read) == pytest.approx(losses(expected), abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("way", EXPERTS)
def test_experts_of_a_torch_dist_checkpoint_are_resumed_as_they_were(world, way, tmp_path):
    expected, grid = world.resharded(way, Grid(1, 2)), Grid(1, 2)
    target = convert(world.trained(way), tmp_path / "x", f"--step={HALF}", "--to=torch_dist")
    read = world.read(target, tmp_path / "read", way, grid, classic=False)
    assert not unlike(read, expected, grid, ("model", "optimizer", "held", "iteration"))
    assert losses(read) == losses(expected)


@pytest.mark.long
def test_momentum_of_sgd_goes_along(world, tmp_path):
    """Megatron itself takes it from no torch_dist checkpoint, so a run in one piece is the reference."""
    keys = {"optimizer": "sgd", "sgd_momentum": 0.9}
    for stop in (HALF, STEPS):
        (tmp_path / str(stop)).mkdir()
        arguments = *world.model("bf16")[::-1], Grid(), tmp_path / str(stop), 0, stop, keys
        run_ranks(segment, Grid(), *arguments)

    first = convert(tmp_path / str(HALF), tmp_path / "x", f"--step={HALF}", grid=Grid(2, 1))
    target = convert(first, tmp_path / "y", grid=Grid(1, 2))

    there = tmp_path / "read"
    there.mkdir()
    run_ranks(
        go_on, Grid(1, 2), world.model("bf16")[0], Grid(1, 2), keys, iteration(target), there, True, True
    )
    assert losses(there) == pytest.approx(losses(tmp_path / str(STEPS)), abs=1e-6)


def test_what_is_no_parameters_goes_along(world, tmp_path):
    """The loss scale of fp16, and steps that are counted for each parameter, as torch's own AdamW does."""
    grid, other = Grid(2, 1), Grid(1, 2)
    source = shutil.copytree(world.resharded("bf16", grid, trains=False), tmp_path / "source")
    scaler = {"scale": torch.tensor([65536.0]), "growth_tracker": 3, "hysteresis_tracker": 2}
    for path in source.glob("mp_rank_*/*"):
        content = torch.load(path, weights_only=False)
        content["optimizer"]["grad_scaler"] = scaler
        for state in content["optimizer"]["optimizer"]["state"].values():
            state["step"] = torch.tensor(3.0)
        torch.save(content, path)

    there = convert(source, tmp_path / "there", grid=other)
    stacked = convert(there, tmp_path / "stacked", "--to=torch_dist")
    interleaved = convert(stacked, tmp_path / "interleaved", "--vpp=2", grid=Grid())
    back = convert(interleaved, tmp_path / "back", grid=grid)

    common = torch.load(stacked / "common.pt")
    assert not list(differences(common["optimizer"]["grad_scaler"], scaler))
    assert common["optimizer"]["optimizer"]["state"] == {"common_step": torch.tensor(3.0)}
    assert not unlike(iteration(back), source, grid, ("model", "optimizer", "opt_param_scheduler"))
    assert (
        torch.load(next(iteration(back).glob("*/*")), weights_only=False)["args"].consumed_train_samples == 12
    )
    assert (
        read_manifest(back)["facts"]["optimizer"]["merkle"]
        == read_manifest(there)["facts"]["optimizer"]["merkle"]
    )


# Faults: what the tests above compare is not the same with any of them


def exchanged(kind, one, other=None):
    """A state of a parameter in the place of another's."""

    def fault(sources):
        def wrong(folder, spec, prefix="", **rest):
            found = sources(folder, spec, prefix, **rest)
            if prefix == STATE.format(kind):
                first = next(n for n, at in enumerate(found) if at.name.endswith(one))
                rest = range(first + 1, len(found))
                second = next(n for n in rest if found[n].name.endswith(other or one))
                a, b = found[first], found[second]
                found[first], found[second] = replace(a, stored=b.stored), replace(b, stored=a.stored)
            return found

        return wrong

    return fault


def each_others(sources):
    """Each moment in the place of the other."""
    both = [STATE.format(kind) for kind in ("exp_avg", "exp_avg_sq")]
    other = dict(zip(both, both[::-1], strict=True))
    return lambda folder, spec, prefix="", **rest: sources(folder, spec, other.get(prefix, prefix), **rest)


def norms_from_the_last(children):
    first, second = (children.index(name) for name in ("input_layernorm", "pre_mlp_layernorm"))
    found = list(children)
    found[first], found[second] = found[second], found[first]
    return found


FAULTS = {
    "moments in each other's place": (torch_dist, "sources", each_others),
    "a moment of another layer": (torch_dist, "sources", exchanged("exp_avg", "linear_fc2.weight")),
    "a moment of another half": (torch_dist, "sources", exchanged("exp_avg_sq", "linear_fc1.weight")),
    "a moment of another norm": (
        torch_dist, "sources", exchanged("exp_avg", "qkv.layer_norm_weight", "fc1.layer_norm_weight"),
    ),
    "numbers in the order of names": (optimizer, "module_order", lambda _: lambda name: name),
    "numbers of norms from the last": (moments, "CHILDREN", norms_from_the_last),
    "weight decay of none": (optimizer, "in_order", lambda order: lambda *words: order(*words)[::-1]),
    "no count of steps": (
        optimizer, "in_order",
        lambda order: lambda *words: [{**group, "step": 0} for group in order(*words)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(world, fault, tmp_path, monkeypatch):
    owner, name, change = FAULTS[fault]
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    grid = Grid(1, 2)
    target = convert(world.trained("bf16"), tmp_path / "x", f"--step={HALF}", grid=grid)
    assert unlike(iteration(target), world.resharded("bf16", grid), grid)


@pytest.mark.parametrize(
    ("way", "kind"),
    [("bf16", "fp32_param"), pytest.param("fp32, distributed", "param", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("to", ["classic", "torch_dist"])
def test_a_master_of_another_layer_does_not_round_to_the_weight(
    world, way, kind, to, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch_dist, "sources", exchanged(kind, "linear_proj.weight")(torch_dist.sources))
    words = [str(world.trained(way)), str(tmp_path / "x"), f"--step={HALF}", "--to", to, "--optim"]
    assert main(["convert", *words]) == 2
    assert "o_proj.weight in float32 does not round to the" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_losses_show_moments_in_each_others_place(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist, "sources", each_others(torch_dist.sources))
    grid = Grid(1, 2)
    target = convert(world.trained("bf16"), tmp_path / "x", f"--step={HALF}", grid=grid)
    read = world.read(iteration(target), tmp_path / "read", "bf16", grid, classic=True)
    assert losses(read) != pytest.approx(losses(world.resharded("bf16", grid)), abs=1e-3)


# What is refused


def classic(change):
    """A classic checkpoint whose ranks' optimizers are changed."""

    def make(world, target):
        shutil.copytree(world.resharded("bf16", Grid(2, 1), trains=False), target)
        for path in target.glob("mp_rank_*/*"):
            content = torch.load(path, weights_only=False)
            change(content, path)
            torch.save(content, path)
        return target

    return make


def stacked(change):
    """A torch_dist checkpoint whose common values, or names of tensors, are changed."""

    def make(world, target):
        shutil.copytree(iteration(world.trained("bf16")), target)
        (target / "plait.json").unlink()
        common = torch.load(target / "common.pt")
        metadata = pickle.loads((target / ".metadata").read_bytes())
        change(common, metadata.state_dict_metadata)
        torch.save(common, target / "common.pt")
        (target / ".metadata").write_bytes(pickle.dumps(metadata))
        return target

    return make


def without_the_last(content, path):
    inner = content["optimizer"]["optimizer"]
    del inner["state"][inner["param_groups"][1]["params"].pop()]
    content["optimizer"]["fp32_from_fp16_params"][1].pop()


def of_another_step(content, path):
    if "mp_rank_01" in str(path):
        for group in content["optimizer"]["optimizer"]["param_groups"]:
            group["step"] = 2


def in_another_order(content, path):
    """A file that some tool has written anew: two norms of a layer have changed places."""
    names = list(content["model"])
    layer = "decoder.layers.1."
    first, second = (
        names.index(f"{layer}{name}.weight") for name in ("input_layernorm", "pre_mlp_layernorm")
    )
    names[first], names[second] = names[second], names[first]
    content["model"] = {name: content["model"][name] for name in names}


def rename(content, name, other):
    content[other] = content.pop(name)


def alike(name):
    """A tensor more."""
    return lambda _, names: names.update({name: names["output_layer.weight"]})


def inner_of(content):
    return content["optimizer"]["optimizer"]


REFUSED = {
    "no optimizer": (classic(lambda content, _: content.pop("optimizer")), "holds no optimizer's state"),
    "buckets beside": (classic(lambda content, _: inner_of(content).pop("state")), "has no moments: those"),
    "chained": (classic(lambda content, _: content.update(optimizer=[1])), "of a form that is not converted"),
    "masters of another name": (
        classic(lambda content, _: rename(content["optimizer"], "fp32_from_fp16_params", "fp32_from_fp16")),
        "of a form that is not converted",
    ),
    "more than is known": (
        classic(lambda content, _: content["optimizer"].update(buckets={})),
        "of a form that is not converted",
    ),
    "no numbers": (
        classic(lambda content, _: inner_of(content)["param_groups"][0].update(params=3)),
        "of a form that is not converted",
    ),
    "a master too few": (
        classic(lambda content, _: content["optimizer"]["fp32_from_fp16_params"].pop()),
        "group 1 .* 5 parameters and 0 masters, the model has 5 such",
    ),
    "frozen": (classic(without_the_last), r"group 1 .* 4 parameters and 4 masters, the model has 5 such"),
    "other groups": (
        classic(lambda content, _: inner_of(content)["param_groups"].append({"params": [], "wd_mult": 1.0})),
        "groups of its optimizer are not one with weight decay and one without",
    ),
    "another state": (
        classic(lambda content, _: inner_of(content)["state"][2].update(max_exp_avg_sq=torch.zeros(1))),
        "the optimizer has exp_avg, exp_avg_sq, master, max_exp_avg_sq of decoder.layers.0.self",
    ),
    "two ranks' steps": (classic(of_another_step), "mp_rank_01/.* its optimizer has made 2 and 3 steps"),
    "another layer's shape": (
        classic(lambda content, _: inner_of(content)["state"][3].update(exp_avg=torch.zeros(3, 2))),
        r"exp_avg of decoder.layers.0.mlp.linear_fc1.weight has shape \(3, 2\)",
    ),
    "another order": (classic(in_another_order), "norm.weight in float32 does not round to the bfloat16"),
    "buckets": (
        stacked(lambda common, _: common["optimizer"].update(param_state_sharding_type="dp_reshardable")),
        "distributed optimizer as dp_reshardable",
    ),
    "frozen, stacked": (
        stacked(lambda _, names: names.pop("optimizer.state.exp_avg.decoder.final_layernorm.weight")),
        r"has no tensor optimizer.state.exp_avg.decoder.final_layernorm.weight",
    ),
    "more, stacked": (
        stacked(alike("optimizer.state.exp_avg.decoder.x")),
        r"has optimizer.state.exp_avg.decoder.x, which a Mistral",
    ),
    "none, stacked": (stacked(lambda common, _: common.pop("optimizer")), "holds no optimizer's state"),
    "precision-aware": (
        stacked(alike("optimizer.state.master_param.x")),
        "has the optimizer's master_param, which is not converted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_converted_is_refused_by_name(world, name, tmp_path, capsys):
    make, sentence = REFUSED[name]
    source = make(world, tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "x"), "--optim"]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


@pytest.mark.long
@pytest.mark.parametrize("form", ["dp_reshardable", "dp_zero_gather_scatter"])
def test_a_distributed_optimizer_of_another_form_is_refused_by_name(
    world, form, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(SHARDING, "distrib_optim_sharding_type", form)
    arguments = *world.model("bf16")[::-1], Grid(), tmp_path, 0, 2, BF16 | DISTRIBUTED
    run_ranks(segment, Grid(), *arguments, copies=2)
    assert main(["convert", str(tmp_path / "iter_0000002"), str(tmp_path / "x"), "--optim"]) == 2
    assert f"has the state of a distributed optimizer as {form}" in capsys.readouterr().err


def test_models_without_an_optimizer_are_refused_by_name(tmp_path, capsys):
    maker = Maker(tmp_path)
    for source, words, sentence in (
        (maker.hf(), [], "holds no optimizer's state"),
        (maker.shards(maker.hf(), 2, 1), [], "holds no optimizer's state"),
        (maker.shards(maker.mixtral(), 1, 1), [], "holds no optimizer's state"),
        (maker.hf(), ["--to=hf"], "Hugging Face folders hold no optimizer"),
    ):
        assert main(["convert", str(source), str(tmp_path / "x"), "--optim", *words]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    assert main(["convert", "data/models/raw_hf/m", "data/models/raw/m-megatron", "--optim"]) == 2
    assert "--optim was given for data/models/raw/m-megatron" in capsys.readouterr().err
