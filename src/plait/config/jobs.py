"""What each job asks a Slurm cluster for; where there is none, nothing looks at it.

Every rule is of a class (:data:`RULES`), which sets defaults; ``jobs.classes`` and ``jobs.rules`` of config/
go over these key by key. The words of :meth:`Ask.resources` are those of snakemake-executor-plugin-slurm.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from plait.config.base import Strict

Class = Literal["io", "cpu", "gpu"]

RULES: dict[str, Class] = {
    "raw": "io",
    "lock": "io",
    "fetch": "io",
    "model": "io",
    "schedule": "io",
    "report": "io",
    "short": "io",
    "chat": "cpu",
    "tokenizer": "cpu",
    "index": "cpu",
    "chat_batch": "cpu",
    "index_batch": "cpu",
    "energon": "cpu",
    "analyse": "cpu",
    "convert": "cpu",
    "convert_part": "cpu",
    "shard": "cpu",
    "shard_part": "cpu",
    "verify_megatron": "cpu",
    "verify_sharded": "cpu",
    "verify_iteration": "cpu",
    "export": "cpu",
    "generate": "cpu",
    "train": "gpu",
}
"""The class of each rule."""
CLASSES: dict[Class, dict[str, int]] = {
    "io": {"runtime": 240, "mem_mb": 8_000},
    "cpu": {"runtime": 240, "mem_mb": 16_000},
    "gpu": {"runtime": 1440, "mem_mb": 128_000},
}
"""What a job of a class asks for."""
WHOLE_MODELS = {
    **dict.fromkeys(("convert", "shard", "verify_megatron", "verify_sharded", "generate"), 64_000),
    "export": 128_000,
}
"""Memory of rules that hold a model; it fits one of 7 billion parameters."""

SLURM_LOGS = Path("data/logs/slurm")
"""`slurm-logdir` of profiles/slurm."""
TAKEN = {
    **dict.fromkeys(("time", "time-min"), "runtime"),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "mem_mb"),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "cpus"),
    **dict.fromkeys(
        ("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "tres-per-task"),
        "gpus and gpu_type",
    ),
    **{key: key for key in ("partition", "account", "qos", "constraint", "exclusive", "reservation")},
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "ntasks-per-gpu"), "nodes of a run"),
    **dict.fromkeys(
        ("job-name", "output", "error", "parsable", "export", "comment", "workdir", "chdir", "clusters",
         "array", "wrap", "requeue", "no-requeue", "signal", "open-mode", "quiet", "wait", "test-only",
         "help", "usage", "version", "uid", "gid", "input"), "",
    ),
}  # fmt: skip
"""Options of sbatch that ``slurm_extra`` may not hold, and the key that sets each, if one does."""
OPTION = re.compile(r"--([a-z][a-z-]*)(=[\w.,:@%+/\[\]-]+)?")


def _option(text: str) -> str:
    """An option of sbatch that is free, in one word that no shell reads as anything else."""
    found = OPTION.fullmatch(text)
    if not found:
        raise ValueError(
            f"{text!r} is not one option of sbatch, --name or --name=value without blanks or quotes"
        )
    taken = next((option for option in TAKEN if option.startswith(found[1])), None)
    if taken:
        instead = f"use the key {TAKEN[taken]}" if TAKEN[taken] else "Snakemake sets it, or needs it as it is"
        raise ValueError(f"{text!r} is not for slurm_extra: {instead}")
    if "-J" in text:
        raise ValueError(f"{text!r} holds -J, which Snakemake takes for the name of a job")
    return text


def _rule(name: str) -> str:
    if name not in RULES:
        raise ValueError(f"there is no rule {name!r}; rules are {', '.join(RULES)}")
    return name


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.,@+-]*$")]
Option = Annotated[str, AfterValidator(_option)]
RuleName = Annotated[str, AfterValidator(_rule)]


class Ask(Strict):
    """What a job asks for; null leaves it to the cluster."""

    runtime: PositiveInt | None = Field(
        None, description="minutes; times the attempt, but for train, which goes on where it stopped"
    )
    mem_mb: PositiveInt | None = Field(None, description="memory on each node, in MB; times the attempt")
    cpus: PositiveInt | None = Field(
        None, description="cores on each node; null: one a process, where a rule starts several"
    )
    gpus: NonNegativeInt | None = Field(
        None, description="GPUs on each node; null: one a process of a run, none for other rules"
    )
    gpu_type: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.]+$", description="type of the GPUs, as the cluster calls it, e.g. a100"
    )
    partition: Word | None = Field(None, description="partition, or several with commas")
    account: Word | None = Field(None, description="who pays")
    qos: Word | None = Field(None, description="quality of service")
    constraint: str | None = Field(
        None, pattern=r"^[\w(\[!][\w.,:@+&|*!()\[\]-]*$", description="features of nodes, e.g. a100&ib"
    )
    exclusive: bool | None = Field(None, description="whole nodes, shared with no other job")
    reservation: Word | None = Field(None, description="a reservation")
    slurm_extra: tuple[Option, ...] | None = Field(
        None, description="other options of sbatch, e.g. --nodelist=n[1-4]"
    )

    def resources(self, *, attempt: int, escalates: bool, processes: int, nodes: int) -> dict[str, Any]:
        """The resources of a job, in the executor's words.

        Args:
            attempt: 1 at first, then 2, ...
            escalates: whether another attempt takes more time; it takes more memory in any case.
            processes: of a training run, all nodes together; 0 for other rules.
            nodes: of a training run; 1 for other rules.
        """
        gpus = processes // nodes if self.gpus is None else self.gpus
        gres = ":".join(["gpu", *([self.gpu_type] if self.gpu_type else []), str(gpus)])
        extra = ["--exclusive"] * bool(self.exclusive)
        extra += [f"--reservation={self.reservation}"] * bool(self.reservation)
        found = {
            "runtime": self.runtime and self.runtime * (attempt if escalates else 1),
            "mem_mb": self.mem_mb and self.mem_mb * attempt,
            "cpus_per_task": self.cpus or (processes // nodes or None),
            "gres": gres if gpus else None,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "slurm_extra": shlex.join([*extra, *(self.slurm_extra or ())]) or None,
            # Tasks that the executor would count by GPU start a job's processes more than once.
            **({"nodes": nodes, "tasks_per_gpu": 0} if gpus or nodes > 1 else {}),
            # More than one node: `plait train` starts its own srun, one process a node.
            **({"tasks": nodes, "mpi": "srun"} if nodes > 1 else {}),
        }
        return {key: value for key, value in found.items() if value is not None}


def _defaults() -> str:
    said = (f"{kind} {ask['runtime']} minutes, {ask['mem_mb']} MB" for kind, ask in CLASSES.items())
    return "; ".join(said)


def link_array_log(rule: str, wildcards: Iterable[str], environ: Mapping[str, str] = os.environ) -> None:
    """Make the log of an array's task appear where a failure names it, in the folder of its wildcards.

    The executor (2.8.0) has Slurm write it one folder higher: Slurm knows no wildcards. Here, in the task's
    own process, they are known; the one around it holds those of the array's first task, and has Slurm's
    names of nodes in its environment.

    Args:
        rule: the rule of a job.
        wildcards: the values of its wildcards.
        environ: the environment.
    """
    array, task = (environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    if array is None or task is None or "SLURM_JOB_NODELIST" in environ:
        return
    folder = SLURM_LOGS / f"rule_{rule}" / "_".join(wildcards)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # a requeued task has the number of its former life
        (folder / f"{array}_{task}.log").symlink_to(f"../{array}_{task}.log")


class Jobs(Strict):
    """What jobs ask a Slurm cluster for; changes nothing of what is made."""

    classes: dict[Class, Ask] = Field(
        {},
        description="by class of rules: gpu is train; io is what fetches, links, counts or draws; cpu the "
        f"others. Defaults: {_defaults()}",
    )
    rules: dict[RuleName, Ask] = Field(
        {}, description="by rule, over its class, key by key; those that hold a model have more memory"
    )

    @cached_property
    def by_rule(self) -> dict[str, Ask]:
        """What each rule asks for: its class's defaults, and what config/ says over them."""
        return {rule: self._of(rule) for rule in RULES}

    def _of(self, rule: str) -> Ask:
        kind = RULES[rule]
        merged: dict[str, Any] = dict(CLASSES[kind])
        if rule in WHOLE_MODELS:
            merged["mem_mb"] = WHOLE_MODELS[rule]
        for said in (self.classes.get(kind), self.rules.get(rule)):
            merged |= said.model_dump(exclude_unset=True) if said else {}
        return Ask.model_validate(merged)
