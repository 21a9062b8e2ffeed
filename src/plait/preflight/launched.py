"""What a run will train on what, and the words that start it: the launcher's own, as text."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from plait import layout
from plait.config import Plan
from plait.config.paths import local
from plait.config.run import AXES, Run, processes_per_node
from plait.train.job import Job
from plait.train.launch import command
from plait.train.node import ALONE, added, place, torchrun

Rows = Iterator[tuple[str, str]]


def planned(plan: Plan, run: str) -> Job:
    """The first job of a run, with the way to start that its nodes ask for."""
    schedule = plan.schedule_as_known(run)
    first = plan.first(run) + 1
    steps = [step for step in schedule.steps() if step >= first] if schedule else []
    known = first - 1 + (plan.run(run).save_interval or 1)
    target = layout.Iteration(run=run, iteration=steps[0] if steps else known)
    job = Job(
        start=str(plan.start(target, schedule)),
        analysis=str(plan.analysis(run)),
        schedule=layout.Run(run=run).schedule,
        target=str(target),
        settings=plan.settings(target),
        around=plan.around(run),
    )
    way = job.around["launch"]
    if way == "auto":
        way = "slurm" if job.around["nodes"] > 1 else "local"
    return replace(job, around={**job.around, "launch": way})


def trained(plan: Plan, run: str, job: Job) -> Rows:
    """What is trained, on how many processes, in which batches, for how long."""
    keys, length = plan.run(run), plan.sequence(run)
    yield "model", f"{keys.model}, recipe {keys.recipe}, from {job.start}"
    yield "data", f"{job.analysis}, sequences of {length:,} tokens"
    each = processes_per_node(job.settings, keys.nodes)
    yield "processes", f"{_factors(keys)}; {each} on each of {keys.nodes} nodes"
    yield "batch", f"{_batch(keys)} micro-batches; {keys.global_batch_size * length:,} tokens a step"
    yield "length", _length(plan, run)


def _factors(keys: Run) -> str:
    sizes = zip(("TP", "PP", "CP", "DP"), AXES, strict=True)
    return f"{keys.world_size} = " + " x ".join(f"{name} {getattr(keys, axis)}" for name, axis in sizes)


def _batch(keys: Run) -> str:
    times = keys.global_batch_size // (keys.micro_batch_size * keys.data_parallel_size)
    return f"{keys.global_batch_size} = {keys.micro_batch_size} x DP {keys.data_parallel_size} x {times}"


def _length(plan: Plan, run: str) -> str:
    schedule = plan.schedule_as_known(run)
    if schedule is None:
        return "follows from data that do not exist yet"
    begun = plan.first(run)
    saved = [step for step in schedule.steps() if step > begun]
    return (
        f"iterations {begun + 1} to {schedule.train_iters}, {len(saved)} checkpoints: every "
        f"{schedule.save_interval} and the last"
    )


def launched(plan: Plan, job: Job, *, in_image: bool) -> Rows:
    """The command of the job and of each of its nodes, their environment, the image and the Slurm job.

    Args:
        plan: the plan.
        job: of :func:`planned`.
        in_image: whether it runs as under ``--sdm apptainer``.
    """
    image = str(local(plan.config.images.gpu))
    nodes = job.machines
    processes = processes_per_node(job.settings, nodes)
    if job.around["launch"] == "env":
        yield "starts", "nothing: who sets WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT starts each rank"
    else:
        yield "starts", _text(job, command(job, image if in_image else ""))
        for node in range(nodes):
            where = ALONE if nodes == 1 else place(node, nodes, host="NODE0", port="PORT")
            yield f"node {node}", _text(job, torchrun(job, processes, where))
    for number, (name, value) in enumerate(sorted(added(job, processes).items())):
        note = "  (of this machine's cores; there, of each node's)" if name.endswith("_NUM_THREADS") else ""
        yield "" if number else "environment", f"{name}={value}{note}"
    yield from _container(plan, image, in_image=in_image)
    asked = plan.asks("train", run=job.run.run)
    yield "slurm", ", ".join(f"{key} {value}" for key, value in asked.items())


def _container(plan: Plan, image: str, *, in_image: bool) -> Rows:
    there = "" if Path(image).exists() else ", which is not here: `make image`"
    if not in_image:
        yield "container", f"none; with --sdm apptainer {image}{there}"
        return
    yield "container", f"{image}{there}"
    for name, value in sorted(plan.containers().items()):
        yield "", f"{name}={value}"


def _text(job: Job, words: list[str]) -> str:
    """A command as it would be typed; what the job is stands in one word."""
    names = {job.to_json(): "JOB", sys.executable: "python"}
    return " ".join(names.get(word) or shlex.quote(word) for word in words)
