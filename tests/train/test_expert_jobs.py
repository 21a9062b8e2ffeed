"""`plait train` itself on a mixture of experts, and what its export writes."""

import numpy as np
import pytest
import torch
from jobs import TARGET, packed
from makers import Maker

from plait import files
from plait.convert.export import export_folder
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify import logits, parity
from plait.verify.cases import Case
from plait.verify.ours import of_megatron
from plait.verify.ranks import run_ranks  # noqa: F401 - loaded before ranks are forked

SHARED = {"data_parallel_size": 2, "expert_model_parallel_size": 2}


def mixtral(maker):
    return maker.mixtral(num_hidden_layers=2, initializer_range=0.2)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Trains a Mixtral in some way, once."""
    done = {}

    def train(**keys):
        name = str(sorted(keys.items()))
        if name not in done:
            root = tmp_path_factory.mktemp("job")
            place = packed(root, model=mixtral, hidden_dropout=0.0, global_batch_size=2, **keys)
            place.train(env={"OMP_NUM_THREADS": "1"})
            done[name] = place
        return done[name]

    return train


def check(one, other):
    for key in ("lm loss", "grad norm"):
        pairs = [[row[key] for row in place.rows()] for place in (one, other)]
        assert len(pairs[0]) == 24
        assert np.allclose(*pairs, atol=1e-5, rtol=1e-5), key
    assert one.rows()[-1]["lm loss"] < one.rows()[0]["lm loss"] - 0.3


def test_a_job_whose_experts_are_dealt_out_trains_as_one_process(job):
    alone, shared = job(), job(**SHARED)

    check(alone, shared)
    facts = [files.check_manifest(place.root / TARGET)["facts"] for place in (alone, shared)]
    assert facts[0]["coverage"] == facts[1]["coverage"]


@pytest.mark.long
@pytest.mark.parametrize(
    "keys",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"use_distributed_optimizer": True},
    ],
    ids=str,
)
def test_experts_are_dealt_out_on_any_grid(job, keys):
    check(job(), job(**SHARED, **keys))


def test_its_export_writes_the_tokens_that_the_trainer_would(job, tmp_path):
    """One pass over a prompt and its answer: where the two agree, step by step they would."""
    from transformers import AutoModelForCausalLM

    place, grid = job(**SHARED), Grid()
    source = mixtral(Maker(place.root / "made"))
    export_folder(source, place.root / TARGET, tmp_path, recipe="chat", chat_template=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[1, 60, 62, 64, 66]])
    served = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=2)

    spec = Spec.of(tmp_path)
    case = Case("greedy", served[:, :-1], torch.zeros_like(served[:, :-1]))
    load = parity.Trained(place.root / TARGET, spec, grid)
    found, _ = of_megatron(spec, grid.tp, load, [case])
    greedy = found[torch.float32][0].argmax(-1)[:, prompt.shape[1] - 1 :]

    assert greedy.tolist() == served[:, prompt.shape[1] :].tolist()
    rows = parity.computed(tmp_path, spec, grid.tp, load)
    assert not logits.failures(**rows), rows
