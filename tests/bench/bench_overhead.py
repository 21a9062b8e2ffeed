"""How much of a step is not Megatron's: ``python tests/bench/bench_overhead.py [ITERATIONS]``.

A model of about 60M parameters is trained here by `plait train`'s own rank, in one process, over packed text.
Forward, backward and the optimizer's step are timed inside of it, and the wall time around them: batches,
metrics, agreeing on signals, the log of samples, TensorBoard. States and checkpoints are not counted. Memory
is that of the whole process at most.
"""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from peaks import peak

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

SIZES = {
    "num_hidden_layers": 8, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64,
}  # fmt: skip
"""57M parameters in layers, without embeddings: little of the step is anything but products."""
BATCH = 32


class Clock:
    """Seconds inside of functions."""

    def __init__(self):
        self.inside = 0.0

    def around(self, function):
        def timed(*args, **keys):
            began = time.perf_counter()
            try:
                return function(*args, **keys)
            finally:
                self.inside += time.perf_counter() - began

        return timed


def main(iterations):
    """Train, and say the shares."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    from jobs import packed
    from makers import Maker

    from plait import layout
    from plait.config.run import Around, Asked
    from plait.train import build, loop, rank
    from plait.train.job import Job

    clock, told = Clock(), []
    passes, optimizers, rows = loop.Trainer._pass, build.optimizer_of, loop.Trainer._row

    def optimizer_of(*args):
        optimizer = optimizers(*args)
        optimizer.step = clock.around(optimizer.step)
        optimizer.zero_grad = clock.around(optimizer.zero_grad)
        return optimizer

    def row(trainer):
        told.append((time.perf_counter(), clock.inside))
        return rows(trainer)

    loop.Trainer._pass, build.optimizer_of, loop.Trainer._row = clock.around(passes), optimizer_of, row
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        keys = {"train_iters": iterations, "save_interval": iterations, "global_batch_size": BATCH}
        keys |= {"micro_batch_size": BATCH // 4, "hidden_dropout": 0.0}
        place = packed(Path(folder), model=lambda maker: Maker.hf(maker, **SIZES), **keys)
        os.chdir(folder)
        target = str(layout.Iteration(run="r", iteration=iterations))
        asked = Asked(until=iterations).model_dump(mode="json")
        inputs = place.start, "data/analysis/x", "data/ckpts/r/schedule.json"
        around = Around(**place.around).model_dump(mode="json")
        rank.run_rank(Job(*inputs, target, place.settings, around, asked))
        waits = [row["data-time"] for row in place.rows()]
    (began, before), (ended, after) = told[2], told[-1]
    wall, inside, count = ended - began, after - before, len(told) - 3
    waited = sum(waits[2:-1])
    share, data = (wall - inside + waited) / wall, waited / wall
    figures = f"{share:.2%} is not Megatron's, {data:.2%} of it is waiting for data"
    print(f"{count} steps of {wall / count:.2f} s: {figures}; {peak():.2f} GB")  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
