import json
import math
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from plait.config.run import STAGES, Logging
from plait.models.specs import Spec
from plait.train.figures import Timed, flops_per_token
from plait.train.loop import Sums
from plait.train.metrics import Metrics

LOGGING = Logging().model_dump()


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(run, start, stop, loss):
    with Metrics(run, start=start, stop=stop, logged=LOGGING) as metrics:
        for iteration in range(start + 1, stop + 1):
            metrics.write({"iteration": iteration, "lm loss": loss})


def test_a_segment_made_again_keeps_the_rows_of_the_others(tmp_path):
    train(tmp_path, 0, 3, 3.0)
    train(tmp_path, 3, 6, 2.0)
    train(tmp_path, 0, 3, 9.0)
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [row["lm loss"] for row in rows(tmp_path)] == [9.0] * 3 + [2.0] * 3


def test_half_a_line_of_a_killed_job_is_dropped(tmp_path):
    train(tmp_path, 0, 2, 3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "lm lo')
    train(tmp_path, 2, 4, 2.0)
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_tensorboard_has_every_figure_of_the_rows(tmp_path):
    """Of a run that was killed after its third iteration and went on after its second."""
    told = {"lm loss": 3.5, "learning-rate": 1e-4, "skipped steps": 0}
    more = {3: {"validation lm loss": 2.25}, 4: {"lm loss": math.nan, "grad norm": math.inf}}
    for start, stop, steps in ((0, 4, (1, 2, 3)), (2, 4, (3, 4))):
        with Metrics(tmp_path, start=start, stop=stop, logged=LOGGING | {"spike_threshold": 2.0}) as metrics:
            for step in steps:
                metrics.write(
                    {"iteration": step, **told, "tokens/s": 10.0 * step + start, **more.get(step, {})}
                )
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()

    expected = {}
    for row in rows(tmp_path):
        for name in row.keys() - {"iteration"}:
            expected.setdefault(name, {})[row["iteration"]] = float(row[name])
    found = {tag: {one.step: one.value for one in seen.Scalars(tag)} for tag in seen.Tags()["scalars"]}
    assert {"lm loss", "loss spike"} <= {name for row in rows(tmp_path) for name in row}
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert [one.step for one in seen.Scalars(tag)] == [*values]
        assert found[tag] == pytest.approx(values, rel=1e-6, nan_ok=True)


def counted(config, sequence, *, frozen):
    """Operations of a token that PyTorch counts in transformers' model; a part before it is trained."""
    model = LlamaForCausalLM(config)
    if frozen:
        model.requires_grad_(requires_grad=False)
    embeddings = torch.randn(1, sequence, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings).logits.float().sum().backward()
    return counter.get_total_flops() / sequence


SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("sequence", [16, 64])
@pytest.mark.parametrize("freeze", [(), STAGES[2]["freeze"], STAGES[1]["freeze"], ("vision_projection",)])
def test_operations_of_a_token_are_those_of_the_rule_and_of_a_count(sequence, freeze):
    text = {"architectures": ["LlamaForCausalLM"], **SIZES}
    pictures = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", **SIZES},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    spec = Spec.from_config(pictures if freeze else text)
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 176
    weights, norms = 3 * layer + 320 * 64, 7 * 64
    frozen = "language_model" in freeze
    passes = 2 + 2 + (0 if frozen else 2)

    flops = flops_per_token(spec, sequence, freeze=freeze)

    assert flops == passes * (weights + norms) + 12 * 3 * 64 * sequence
    tied = replace(spec, tied=True)  # the embedding is its output layer: the same products
    assert flops_per_token(tied, sequence, freeze=freeze) == flops
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    assert counted(config, sequence, frozen=frozen) == flops - passes * norms


def test_the_time_that_is_waited_for_is_counted():
    def slowly():
        for _ in range(3):
            time.sleep(0.01)
            yield 1

    batches = Timed(slowly())
    assert list(batches) == [1, 1, 1]
    assert 0.03 <= batches.seconds < 1.0


def test_losses_of_sequences_with_pictures_and_without():
    both = Sums(loss=30.0, tokens=10.0, picture_loss=24.0, picture_tokens=6.0, all_tokens=16, clipped=0)
    assert both.losses() == {"lm loss": 3.0, "loss tokens": 10.0, "img lm loss": 4.0, "txt lm loss": 1.5}
    assert Sums(30.0, 10.0, 0.0, 0.0, 16, 0).losses() == {"lm loss": 3.0, "loss tokens": 10.0}
