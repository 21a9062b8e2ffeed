"""What is around the work: of a training step what is not Megatron's, of a shard's job what is not the shard.

A model of about 60M parameters is trained by `plait train`'s own rank, in one process, over packed text.
Forward, backward and the optimizer's step are timed inside of it, and the wall time around them: batches,
metrics, agreeing on signals, the log of samples, TensorBoard. States and checkpoints are not counted.
"""

import json
import logging
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import yaml

from tests.bench.harness import ROOT, Figure, Told, peak_of_children, processor

SIZES = {
    "num_hidden_layers": 8, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64,
}  # fmt: skip
"""57M parameters in layers, without embeddings: little of the step is anything but products."""
BATCH = 32
ITERATIONS = 12


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


WORK = 0.1
CORES = 2
MOST = 2.5
"""How many times the ideal a thousand jobs may take by the clock."""
RECORD = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])


BUSY = f"""
import time

def read(record, pictures):
    until = time.process_time() + {WORK}
    while time.process_time() < until:
        pass
    return [{{"from": "human", "value": record["ask"]}}, {{"from": "gpt", "value": "Hello."}}]
"""
"""A reader of the user's own: {WORK} s of a processor for a record, whatever is around it."""


def many(folder, shards, **keys):
    """A project, its config, and the shards to ask for: two small records each."""
    source = {"kind": "chat-jsonl", "path": "records.jsonl"}
    return project_of(folder, f"{RECORD}\n" * 2 * shards, source, shards, **keys)


def busy(folder, shards, **keys):
    """The same of one record each, which takes WORK seconds of a processor."""
    source = {"kind": "files", "path": "records.jsonl", "shape": "busy.py"}
    made = project_of(folder, '{"ask": "Hi"}\n' * shards, source, shards, **keys)
    made[0].write("busy.py", BUSY)
    return made


def project_of(folder, records, source, shards, **keys):
    """A project with a dataset and a mixture, its config, and the shards to ask for."""
    from projects import Project

    project = Project.make(Path(folder) / "project")
    project.write("records.jsonl", records)
    config = {
        "datasets": {"many": {"source": source, "shards": shards, **keys}},
        "mixtures": {"many": {"format": "chatml", "pack": 256, "datasets": ["many"]}},
    }
    return project, config, [f"data/processed/many/shard_{n:05d}.jsonl.gz" for n in range(shards)]


def own_step(seed):
    """The share of a step that is Megatron's, and what the rest of it is."""
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
        keys = {"train_iters": ITERATIONS, "save_interval": ITERATIONS, "global_batch_size": BATCH}
        keys |= {"micro_batch_size": BATCH // 4, "hidden_dropout": 0.0}
        place = packed(Path(folder), model=lambda maker: Maker.hf(maker, **SIZES), **keys)
        os.chdir(folder)
        target = str(layout.Iteration(run="r", iteration=ITERATIONS))
        asked = Asked(until=ITERATIONS).model_dump(mode="json")
        inputs = place.start, "data/analysis/x", "data/ckpts/r/schedule.json"
        around = Around(**place.around).model_dump(mode="json")
        rank.run_rank(Job(*inputs, target, place.settings, around, asked))
        waits = [row["data-time"] for row in place.rows()]
    (began, before), (ended, after) = told[2], told[-1]
    wall, inside, count = ended - began, after - before, len(told) - 3
    waited = sum(waits[2:-1])
    data = waited / wall
    return Told(inside / wall, f"{wall / count:.2f} s a step, {data:.2%} of it waiting for data")


def planned(seed, *, shards, each, runs, cpu, memory):
    """What a dry run may take, of a processor in s and of memory in MB, to what it takes: the lesser."""
    with tempfile.TemporaryDirectory() as folder:
        project, config, _ = many(folder, shards, shards_per_job=each)
        words = ["-n", "--quiet", "all", "--cores", "2"]
        target = ["data/analysis/many/plait.json"]
        if runs:
            config |= trained(runs)
            target = [f"data/ckpts/r{number}/hf/model_iter_100" for number in range(runs)]
        before = processor()
        done = project.snakemake(*words, *target, config=config, timeout=900)
        spent = processor() - before
    assert done.code == 0, done.text
    most = peak_of_children()
    told = f"{shards} shards, {each} a job, {runs} runs: {spent:.1f} s of processor, {most:.0f} MB"
    return Told(min(cpu / spent, memory / most), told, most)


def trained(runs):
    """As many runs over the dataset."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    run = config["runs"]["chat-tiny"] | {"mixture": "many"}
    return {"runs": {f"r{number}": run for number in range(runs)}}


def local(seed, *, jobs, shards):
    """What WORK seconds for each shard would take at best, MOST times, to what their jobs take.

    A shard is one record, whose reader keeps a processor busy for WORK seconds: so much of each job is its
    work. All else is counted: Snakemake's start and plan, the raw source, a shell and a Python for each job,
    and Snakemake's own work for it, which is on the same two cores. Python keeps compiled modules, as it does
    where nobody forbids it.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        project, config, targets = busy(folder, shards, shards_per_job=shards // jobs)
        begun, before = time.monotonic(), processor()
        project.run(*targets, config=config, timeout=3000)
        wall, spent = time.monotonic() - begun, processor() - before
    ideal = WORK * shards / CORES
    told = f"{jobs} jobs of {shards} shards: {wall:.0f} s, {spent:.0f} s of processor; {wall / ideal:.2f}x"
    return Told(MOST * ideal / wall, told, peak_of_children())


ROWS = [
    Figure("step-of-megatron", None, own_step, rounds=1),
    Figure("plan-100", 1.0, partial(planned, shards=48, each=1, runs=0, cpu=3, memory=1e3)),
    Figure(
        "plan-batched", 1.0, partial(planned, shards=20_000, each=100, runs=3, cpu=60, memory=1e3), rounds=1
    ),
    Figure(
        "plan-unbatched",
        1.0,
        partial(planned, shards=20_000, each=1, runs=3, cpu=150, memory=1.2e3),
        rounds=1,
    ),
    Figure("jobs-overhead", 1.0, partial(local, jobs=1000, shards=1000), rounds=1),
]
