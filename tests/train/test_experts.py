"""A mixture of experts spread in any way gives the losses and gradients of a plain loop over transformers."""

import json

import numpy as np
import pytest
import torch
from saving import save_tensors
from test_loop import AROUND, RUN, SIZES, feed
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from plait.convert import engine
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

STEPS = 20
SAME = {**RUN, "lr": 5e-3, "lr_decay_style": "constant", "lr_warmup_iters": 0}
CHOSEN = 2
SHARED = {"expert_model_parallel_size": 2}
OVERLAPPED = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
WAYS = {
    "alone": (Grid(), {}, {}),
    "experts over two": (Grid(), {"copies": 2, "ep": 2}, SHARED),
    "copies of all experts": (Grid(), {"copies": 2}, {}),
    "tensor and sequence parallel": (Grid(2, 1), {}, {"sequence_parallel": True}),
    "experts and tensors": (Grid(2, 1), {"copies": 2, "ep": 2}, {**SHARED, "sequence_parallel": True}),
    "experts and stages": (Grid(1, 2), {"copies": 2, "ep": 2}, SHARED),
    "experts over two of four": (Grid(), {"copies": 4, "ep": 2}, SHARED),
    "experts over four": (Grid(), {"copies": 4, "ep": 4}, {"expert_model_parallel_size": 4}),
    "experts over context": (Grid(), {"cp": 2, "ep": 2}, {**SHARED, "context_parallel_size": 2}),
    "experts, distributed optimizer": (
        Grid(), {"copies": 4, "ep": 2},
        {**SHARED, **dict.fromkeys(OVERLAPPED, True)},
    ),
    "experts, layers again": (
        Grid(), {"copies": 2, "ep": 2},
        {**SHARED, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
}  # fmt: skip
SHORT = ("alone", "experts over two")


@pytest.fixture(scope="module")
def model():
    config = MixtralConfig(
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=CHOSEN,
        experts_implementation="eager",
        **SIZES,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


def on_the_hub(state):
    """Tensors by their names in files on the hub, where each expert has its own."""
    found = {}
    for ours, tensor in state.items():
        name = ours.replace(".mlp.", ".block_sparse_moe.")
        below, _, kind = name.rpartition(".")
        for expert, one in enumerate(tensor if below.endswith(".experts") else ()):
            gate, up = one.chunk(2)
            parts = {"w1": gate, "w3": up} if kind == "gate_up_proj" else {"w2": one}
            found |= {f"{below}.{expert}.{part}.weight": values for part, values in parts.items()}
        if not below.endswith(".experts"):
            found[name] = tensor
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def plainly(model, steps, coefficient=0.0):
    """Transformers, torch's AdamW and nothing else: losses, norms, the first gradients, balances."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": SAME["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SAME["lr"], betas=(0.9, 0.95), eps=SAME["adam_eps"])
    losses, norms, balances, first = [], [], [], None
    for step in range(steps):
        batches = list(feed(steps=STEPS).batches(step))
        tokens = sum(batch.loss_mask.sum() for batch in batches)
        total = 0.0
        for batch in batches:
            loss, balance = _losses(model, batch)
            ((loss + coefficient * balance * batch.input_ids.numel()) / tokens).backward()
            total += (loss / tokens).item()
            balances.append(balance.item() / model.config.num_hidden_layers)
        first = first or on_the_hub({name: p.grad for name, p in model.named_parameters()})
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    model.load_state_dict(start)
    return losses, norms, first, np.reshape(balances, (steps, -1)).mean(axis=1)


def _losses(model, batch):
    """The summed loss, and Switch's balance of each layer: transformers', but for its factor top-k."""
    seen = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda _, __, found: seen.append(found[0])) for gate in gates]
    mask = torch.zeros(batch.attention_mask.shape).masked_fill(batch.attention_mask, float("-inf"))
    logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
    for hook in hooks:
        hook.remove()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    balances = [load_balancing_loss_func((one,), 4, CHOSEN) / CHOSEN for one in seen]
    return (losses * batch.loss_mask.flatten()).sum(), sum(balances)


@pytest.fixture(scope="module")
def plain(model):
    return plainly(model, STEPS)


def rank(weights, config, grid, path, steps, keys, before=None, target=None, dtype=torch.float32):
    """The same run on one rank: where it stands, and its first gradients.

    It goes on from the checkpoint ``before`` and ends with ``target``, where there are any.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

    from plait.train.build import build_model, load_cut, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.state import TrainState

    run = {**SAME, **keys}
    spec = Spec.from_config(config)
    inner = build_model(spec, grid, dtype=dtype, run=run)
    load_cut([inner], engine.to_mcore(weights, spec), spec, grid)
    model = wrap([inner], run)
    optimizer = optimizer_of(model, run)
    schedule = schedule_of(optimizer, run, train_iters=steps, sequence=24)
    ours = feed(ps.get_data_parallel_rank(), ps.get_data_parallel_world_size(), STEPS)
    state = TrainState([inner], optimizer, schedule)
    trainer = Trainer(model, state, ours, run, AROUND)
    if before:
        state.load(before, generators=False)

    model[0].zero_grad_buffer()
    trainer._pass(ours, ours.batches(0), forward_only=False)
    clear_aux_losses_tracker()
    gradients = {name: one.main_grad.float().clone().numpy() for name, one in inner.named_parameters()}
    trainer.train(steps, folder=path)
    if target:
        save_tensors(state.sharded(is_loading=False), target)
    place = ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank()
    share = spec.num_experts // ps.get_expert_model_parallel_world_size()
    return place, ps.get_expert_model_parallel_rank() * share, gradients


def joined(ranks, spec, grid):
    """What the ranks hold, by names on the hub."""
    states = {place: {} for place in grid}
    for place, first, state in ranks:
        for name, values in state.items():
            before, experts, after = name.partition(".local_experts.")
            number, _, rest = after.partition(".")
            of_all = f"{before}{experts}{int(number) + first}.{rest}" if experts else name
            found = states[place].setdefault(of_all, torch.from_numpy(values))
            assert torch.equal(found, torch.from_numpy(values)), of_all
    return engine.to_hf(engine.join(states, spec, grid), spec)


def check(name, model, steps, path, expected, **keys):
    grid, world, chosen = WAYS[name]
    config = {**model.config.to_dict(), "architectures": ["MixtralForCausalLM"]}
    weights = on_the_hub(model.state_dict())
    ranks = run_ranks(rank, grid, weights, config, grid, path, steps, {**chosen, **keys}, **world)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses, norms, first, balances = expected
    assert [row["iteration"] for row in rows] == list(range(1, steps + 1))
    assert np.allclose([row["lm loss"] for row in rows], losses[:steps], atol=1e-5, rtol=0)
    assert np.allclose([row["grad norm"] for row in rows], norms[:steps], atol=1e-5, rtol=1e-5)
    found = [row["load balancing loss"] for row in rows if "load balancing loss" in row]
    assert np.allclose(found, balances[:steps] if keys else [], atol=1e-5, rtol=0)
    if chosen.get("use_distributed_optimizer"):
        return  # a rank's gradients are reduced only where its share of the optimizer is
    gradients = joined(ranks, Spec.from_config(config), grid)
    assert gradients.keys() == first.keys()
    largest = max(one.abs().max().item() for one in first.values())
    worst = max((gradients[name] - first[name]).abs().max().item() for name in first)
    assert worst <= 1e-5 * largest


@pytest.mark.parametrize("name", SHORT)
def test_a_few_iterations_are_those_of_the_plain_loop(name, model, plain, tmp_path):
    check(name, model, 4, tmp_path, plain)


@pytest.mark.long
@pytest.mark.parametrize("name", WAYS)
def test_twenty_iterations_are_those_of_the_plain_loop(name, model, plain, tmp_path):
    assert plain[0][-1] < plain[0][0] - 0.3
    check(name, model, STEPS, tmp_path, plain)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in WAYS if "layers again" not in name])
def test_experts_are_balanced_as_transformers_balances_each_layer(name, model, tmp_path):
    """Transformers lays the tokens of all layers end to end and counts each token top-k times."""
    expected = plainly(model, STEPS, coefficient=0.1)
    check(name, model, STEPS, tmp_path, expected, moe_aux_loss_coeff=0.1)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", [{}, {"use_distributed_optimizer": True}], ids=str)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("experts over two", "alone"),
        ("alone", "experts over two"),
        ("experts over two", "experts over four"),
        ("experts over four", "experts and tensors"),
        ("experts and stages", "experts over two of four"),
    ],
)
def test_a_run_goes_on_with_its_experts_dealt_otherwise(first, then, optimizer, model, plain, tmp_path):
    config = {**model.config.to_dict(), "architectures": ["MixtralForCausalLM"]}
    weights, target = on_the_hub(model.state_dict()), tmp_path / "ckpt"
    target.mkdir()
    for name, stop, ends in ((first, 4, (None, target)), (then, 8, (target, None))):
        grid, world, keys = WAYS[name]
        run_ranks(rank, grid, weights, config, grid, tmp_path, stop, keys | optimizer, *ends, **world)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert np.allclose([row["lm loss"] for row in rows], plain[0][:8], atol=1e-5, rtol=0)
    assert np.allclose([row["grad norm"] for row in rows], plain[1][:8], atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["alone", "experts over two", "experts and tensors"])
def test_bf16_experts_with_fp32_masters_stay_near_the_plain_losses(name, model, plain, tmp_path):
    grid, world, keys = WAYS[name]
    config = {**model.config.to_dict(), "architectures": ["MixtralForCausalLM"]}
    weights = on_the_hub(model.state_dict())
    arguments = weights, config, grid, tmp_path, 8, keys, None, None, torch.bfloat16
    run_ranks(rank, grid, *arguments, **world)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([row["lm loss"] for row in rows], plain[0][:8], atol=5e-2, rtol=0)
