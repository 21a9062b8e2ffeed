import json

from plait.train.metrics import Metrics


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(run, start, stop, loss):
    with Metrics(run, start=start, stop=stop) as metrics:
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
