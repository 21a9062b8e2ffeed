"""What a run is measured by while it trains: the losses of transformers, and nothing of it trained."""

import json

import numpy as np
import pytest
import torch
import yaml
from jobs import analysed, packed, pictured
from makers import Maker
from test_energon_feed import FORM, KEYS, sample
from test_loop import AROUND, COLLATE, RUN, STEPS, Shard, feed, model, plain  # noqa: F401

from plait import files
from plait.convert import engine
from plait.data import energon
from plait.errors import DataError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train.batches import Feed, Order
from plait.train.energon import EvaluationFeed, PictureCollator
from plait.verify.ranks import run_ranks

EVERY, BATCHES = 4, 2


def evaluation(rank=0, size=1):
    """Other packs than those that are trained."""
    held_out = Shard(range(10, 17))
    order = Order((1.0,), (7,), 6, BATCHES * RUN["global_batch_size"])
    return Feed([held_out], order, COLLATE, 1, RUN["global_batch_size"], rank, size)


def evaluated_plainly(model):  # noqa: F811
    """The loss of every token of the evaluation by transformers."""
    total = tokens = 0.0
    for batch in (one for number in range(BATCHES) for one in evaluation().batches(number)):
        mask = torch.zeros(batch.attention_mask.shape).masked_fill(batch.attention_mask, float("-inf"))
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        total += (losses * batch.loss_mask.flatten()).sum().item()
        tokens += batch.loss_mask.sum().item()
    return total / tokens


def train_rank(weights, config, grid, path, gathers):
    from megatron.core import parallel_state

    from plait.train.build import build_model, load_weights, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.state import TrainState

    over = dict.fromkeys(
        ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), gathers
    )
    run = {**RUN, **over}
    spec = Spec.from_config(config)
    inner = build_model(spec, grid, dtype=torch.float32, run=run)
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    load_weights(inner, dict(engine.cut(engine.to_mcore(weights, spec), spec, grid, *place)))
    wrapped = wrap([inner], run)
    optimizer = optimizer_of(wrapped, run)
    schedule = schedule_of(optimizer, run, train_iters=STEPS, sequence=24)
    copy = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    Trainer(
        model=wrapped,
        state=TrainState([inner], optimizer, schedule),
        feed=feed(*copy),
        run=run,
        around=AROUND | {"eval_interval": EVERY, "eval_iters": BATCHES},
        evaluation=evaluation(*copy),
        length=STEPS,
    ).train(STEPS, folder=path)


@pytest.mark.parametrize(
    ("tp", "pp", "copies", "gathers"),
    [(1, 1, 1, False), (2, 1, 1, False), (1, 2, 1, False), (1, 1, 2, False), (1, 1, 2, True)],
)
def test_validation_losses_are_those_of_transformers(tp, pp, copies, gathers, model, plain, tmp_path):  # noqa: F811
    grid = Grid(tp=tp, pp=pp)
    config = {**model.config.to_dict(), "architectures": ["MistralForCausalLM"]}
    run_ranks(train_rank, grid, model.state_dict(), config, grid, tmp_path, gathers, copies=copies)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses, _, end = plain
    found = {row["iteration"]: row["validation lm loss"] for row in rows if "validation lm loss" in row}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = evaluated_plainly(model)
    model.load_state_dict(end)
    expected = evaluated_plainly(model)
    model.load_state_dict(start)

    assert sorted(found) == [EVERY, STEPS]
    assert np.isclose(found[STEPS], expected, atol=1e-5, rtol=0)
    assert abs(expected - before) > 0.1
    assert np.allclose([row["lm loss"] for row in rows], losses, atol=1e-5, rtol=0)


# Through `plait train`


def other_mixture(place):
    """A second mixture beside the run's own; the same shard will do."""
    own = place.root / "data/analysis/x"
    folder = analysed(place, yaml.safe_load((own / "mixture.yaml").read_text()), "y")
    files.write_manifest(folder, kind="analysis", settings={}, facts={})


@pytest.mark.long
@pytest.mark.parametrize("make", [packed, pictured])
def test_evaluation_changes_no_bit_of_what_is_trained(make, tmp_path):
    plainly, place = make(tmp_path / "plainly"), make(tmp_path / "evaluated")
    other = {} if make is pictured else {"eval_mixture": "y"}
    if other:
        other_mixture(place)
    plainly.train()
    place.train(eval_interval=8, eval_iters=2, **other)

    (made, rows), (of_plainly, plain_rows) = place.result(), plainly.result()
    assert made == of_plainly
    trained = [{k: v for k, v in row.items() if not k.startswith("validation ")} for row in rows]
    assert trained == plain_rows
    evaluated = [row for row in rows if "validation lm loss" in row]
    assert [row["iteration"] for row in evaluated] == [8, 16, 24]
    assert evaluated[-1]["validation lm loss"] < evaluated[0]["validation lm loss"]
    if make is pictured:
        assert all(row["validation img lm loss"] == row["validation lm loss"] for row in evaluated)


# Energon's val splits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("energon")
    keys = KEYS | {"split": [7, 3, 0]}
    (root / "a").mkdir()
    energon.build(root / "a", (sample("a", n) for n in range(40)), keys)
    blend = energon.blend({str(root / "a"): 1.0}, relative_to=root)
    (root / "blend.yaml").write_text(yaml.safe_dump(blend))
    return Maker(root), root / "blend.yaml"


def held_out(made, rank=0, size=1, micro=2):
    maker, blend = made
    run = {"micro_batch_size": micro, "global_batch_size": 2 * micro * size, "num_workers": 0, "seed": 3}
    collate = PictureCollator(96, False, 260)
    return EvaluationFeed(blend, maker.image, 259, FORM, collate, run, rank, size, size)


def said(one, batches):
    """The answers of an evaluation, in its order."""
    return [
        row[mask == 1].tolist()
        for number in range(batches)
        for batch in one.batches(number)
        for row, mask in zip(batch.labels.numpy(), batch.loss_mask.numpy(), strict=True)
    ]


def test_an_evaluation_reads_the_val_split_from_its_beginning_each_time(made):
    feed_ = held_out(made)
    first, again = said(feed_, 3), said(feed_, 3)
    assert first == again
    assert len({tuple(one) for one in first}) == 12
    more = said(held_out(made), 6)
    assert more[:12] == first
    assert more[12:] == first  # 12 samples in 3 shards of 4, then from the beginning
    ranks = [{tuple(one) for one in said(held_out(made, rank, 2, 1), 3)} for rank in (0, 1)]
    assert not ranks[0] & ranks[1]
    assert ranks[0] | ranks[1] == {tuple(one) for one in first}


def test_a_val_split_that_is_too_small_is_named(made):
    with pytest.raises(DataError, match=r"have no 13 samples for stream 0 of 1"):
        said(held_out(made, micro=13), 1)
