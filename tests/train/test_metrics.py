import json
import time
from dataclasses import replace

from plait.config.run import Logging
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


def test_operations_of_a_token_are_those_of_the_rule():
    spec = Spec.from_config(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        }
    )  # fmt: skip
    weights = 6_738_415_616 - 32000 * 4096
    assert flops_per_token(spec, 4096) == 6 * weights + 12 * 32 * 4096 * 4096
    tied = replace(spec, tied=True)  # the embedding is its output layer: the same products
    assert flops_per_token(tied, 4096) == flops_per_token(spec, 4096)


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
