"""Each data stage by one worker and by two, on idle cores: how much sooner two are done.

A worker is a process that runs a stage's command as the workflow does, one shard or dataset after another. It
has done so once, for a dataset of eight records, before the clock starts: no modules are loaded then. The
clock stops when the last one is done. The analysis of energon's samples is one job of the workflow, with
processes of its own; they are started by the clock. What a worker waited for a core, because others had both,
is taken out, and told.
"""

import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from base64 import b64encode
from functools import partial
from pathlib import Path

import yaml

from tests.bench.harness import Figure, Told, peak, peak_of_children
from tests.bench.rows.pictures import jpegs

WORKERS = 2
DATASETS = [f"d{number}" for number in range(4)]
WARM = [f"warm{number}" for number in range(WORKERS)]
SHARDS = 2
LEAST, MOST = 1500, 2500
"""Records of a dataset: so many for a seed."""
LISTED = 20
"""Times as many are in a LLaVA json, of which a raw source is made: it is parsed, its pictures are read."""
FORM = {"tokenizer": "byte"}
CHAT, PACKS = (
    "data/processed/{}/shard_{:05d}.jsonl.gz",
    "data/megatron_format/packed_{}_pack2048/shard_{:05d}",
)
TOKENIZER = "data/tokenizers/byte"


def chats(name):
    return [CHAT.format(name, number) for number in range(SHARDS)]


STAGES = {
    "raw": lambda name: [["raw", f"data/raw/{name}"]],
    "chat": lambda name: [["chat", f"data/raw/{name}", shard] for shard in chats(name)],
    "index": lambda name: [
        ["index", TOKENIZER, shard, PACKS.format(name, number)] for number, shard in enumerate(chats(name))
    ],
    "energon": lambda name: [["energon", *chats(name), f"data/energon/{name}"]],
}
"""The jobs of a stage for a dataset."""
NEEDS = {"raw": [], "chat": ["raw"], "index": ["raw", "chat"], "energon": ["raw", "chat"]}


def project(folder, seed):
    """A project of datasets of one size: a picture, a question and an answer in each record."""
    from folders import tokenizer_folder

    draw, pictures = random.Random(seed), folder / "pictures"
    pictures.mkdir()
    jpegs(pictures, seed, side=336, count=50)
    urls = [f"data:image/jpeg;base64,{b64encode(one.read_bytes()).decode()}" for one in pictures.iterdir()]
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=3 + number % 7)) for number in range(2000)]
    size = draw.randint(LEAST, MOST)
    for name in (*DATASETS, *WARM):
        with (folder / f"{name}.jsonl").open("w") as out:
            for number in range(8 if name in WARM else size):
                shown = {"type": "image_url", "image_url": {"url": draw.choice(urls)}}
                asked = {"type": "text", "text": " ".join(draw.choices(words, k=20))}
                answer = " ".join(draw.choices(words, k=60))
                turns = [("user", [shown, asked]), ("assistant", answer)]
                messages = [{"role": role, "content": content} for role, content in turns]
                out.write(json.dumps({"id": f"s-{number}", "messages": messages}) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(config()))
    tokenizer_folder(folder / TOKENIZER, vision=True, chatml=True, image=True)
    return f"{len(DATASETS)} datasets of {size:,} records"


def lists(folder, seed):
    """A project of LLaVA jsons of one size: a picture, a question and an answer in each record."""
    draw, pictures = random.Random(seed), folder / "pictures"
    pictures.mkdir()
    jpegs(pictures, seed, side=336, count=50)
    names = [one.name for one in pictures.iterdir()]
    size = draw.randint(LEAST, MOST) * LISTED
    for name in (*DATASETS, *WARM):
        records = []
        for number in range(8 if name in WARM else size):
            words = " ".join(draw.choices(names, k=20))
            turns = [{"from": "human", "value": f"<image>\n{number}?"}, {"from": "gpt", "value": words}]
            records.append({"id": f"{number}", "image": draw.choice(names), "conversations": turns})
        (folder / f"{name}.json").write_text(json.dumps(records))
    source = {"kind": "llava-json", "images": "pictures"}
    datasets = {name: {"source": {**source, "path": f"{name}.json"}} for name in (*DATASETS, *WARM)}
    (folder / "config.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    return f"{len(DATASETS)} LLaVA jsons of {size:,} records"


def config():
    """Datasets in shards, packed and as samples for energon."""
    shards = {"samples_per_shard": 500, "split": [1, 0, 0]}
    datasets = {
        name: {"source": {"kind": "chat-jsonl", "path": f"{name}.jsonl"}, "shards": SHARDS, "energon": shards}
        for name in (*DATASETS, *WARM)
    }
    formats = {
        "packed": {**FORM, "template": "chatml"},
        "asked": {**FORM, "template": "llava", "picture_tokens": 4},
    }
    samples = {"format": "asked", "decoder_seq_length": 1024}
    return {
        "datasets": datasets,
        "tokenizers": {"byte": {"kind": "folder", "path": TOKENIZER}},
        "formats": formats,
        "mixtures": {"warm": {**samples, "datasets": WARM[:1]}, "all": {**samples, "datasets": DATASETS}},
    }


def run(words):
    """A stage, in this process."""
    from plait.cli.main import main

    assert main([*words, "--config", "config.yaml"]) == 0, words


def made(folder, stages):
    """What a stage is made from: the jobs of all stages before it."""
    os.chdir(folder)
    for stage in stages:
        for name in (*DATASETS, *WARM):
            for words in STAGES[stage](name):
                run(words)


def works(folder, warm, jobs, taken, barrier, told):
    """A worker: takes the next job until none is left."""
    os.chdir(folder)
    for words in warm:
        run(words)
    barrier.wait()
    began, waited = time.monotonic(), queued()
    while True:
        with taken.get_lock():
            number, taken.value = taken.value, taken.value + 1
        if number >= len(jobs):
            break
        run(jobs[number])
    told.put((began, time.monotonic(), queued() - waited, max(peak(), peak_of_children())))


def queued():
    """Seconds that this process was ready to run and had no core."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def seconds(folder, warm, jobs, workers):
    """Of the worker that needed most; how long workers waited for a core besides; MB of the largest.

    Args:
        folder: the project.
        warm: what each worker does before the clock starts.
        jobs: what is timed.
        workers: how many there are.
    """
    context = multiprocessing.get_context("spawn")
    taken, barrier, told = context.Value("i", 0), context.Barrier(workers), context.SimpleQueue()
    os.sync()
    started = [
        context.Process(target=works, args=(folder, warm[number], jobs, taken, barrier, told))
        for number in range(workers)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert not process.exitcode
    found = [told.get() for _ in started]
    needed = max(ended - began - waited for began, ended, waited, _ in found)
    return needed, max(one[2] for one in found), max(one[3] for one in found)


def by_jobs(seed, *, stage, project=project):
    """Two workers with a job each, as Snakemake starts them on two cores."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_ROOT")) as temporary:
        said = project(Path(temporary), seed)
        made(temporary, NEEDS[stage])
        jobs = [words for name in DATASETS for words in STAGES[stage](name)]
        warm = [STAGES[stage](name) for name in WARM]
        return ratio(seed, f"{len(jobs)} jobs, {said}", lambda count: seconds(temporary, warm, jobs, count))


def by_processes(seed):
    """One job with two processes."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_ROOT")) as temporary:
        said = project(Path(temporary), seed)
        made(temporary, ["raw", "chat", "energon"])

        def one(count):
            shutil.rmtree("data/analysis", ignore_errors=True)
            words = [
                ["analyse", TOKENIZER, f"data/energon/{name}", "data/analysis/warm"] for name in WARM[:1]
            ]
            job = ["analyse", TOKENIZER, *(f"data/energon/{name}" for name in DATASETS), "data/analysis/all"]
            return seconds(temporary, [words], [[*job, "--workers", str(count)]], 1)

        return ratio(seed, f"one job, {said}", one)


def ratio(seed, said, timed):
    """The time of one worker to that of two; seeds begin with either in turn."""
    order = (1, WORKERS) if seed % 2 == 0 else (WORKERS, 1)
    found = {count: timed(count) for count in order}
    (alone, *_), (both, waited, _) = found[1], found[WORKERS]
    told = f"{said}: {alone:.1f} s alone, {both:.1f} s by two, and {waited:.1f} s without a core"
    return Told(alone / both, told, max(memory for *_, memory in found.values()))


ROWS = [
    Figure("workers-raw", 1.6, partial(by_jobs, stage="raw", project=lists)),
    *(
        Figure(f"workers-{stage}", 1.6, partial(by_jobs, stage=stage))
        for stage in ("chat", "index", "energon")
    ),
    Figure("workers-analyse", 1.6, by_processes),
]
