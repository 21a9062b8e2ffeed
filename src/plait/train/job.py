"""One training job: from a sharded model or a checkpoint to the next checkpoint."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from plait import files, layout
from plait.config.schedule import Schedule
from plait.errors import CheckpointError, ConfigError, DataError


@dataclass(frozen=True)
class Job:
    """What a job trains, by path; every rank reads the same.

    Attributes:
        start: the sharded model or the checkpoint that it starts from.
        analysis: the mixture's analysis.
        schedule: the run's schedule file.
        target: the checkpoint that it ends with.
        settings: the run's settings.
    """

    start: str
    analysis: str
    schedule: str
    target: str
    settings: dict[str, Any]

    def to_json(self) -> str:
        """The job as one argument for the ranks."""
        return json.dumps(vars(self))

    @property
    def inputs(self) -> list[Path]:
        """What the checkpoint is made from."""
        return [Path(self.start), Path(self.analysis), Path(self.schedule)]

    @property
    def shards(self) -> list[tuple[Path, float]]:
        """Indexed shards and their weights, from the mixture."""
        mixture = yaml.safe_load((Path(self.analysis) / "mixture.yaml").read_text(encoding="utf-8"))
        return [(Path(source["prefix"]), float(source["weight"])) for source in mixture["sources"]]

    @property
    def train_iters(self) -> int:
        """The length of the whole run."""
        return int(files.read_json(self.schedule)["train_iters"])

    @property
    def steps(self) -> tuple[int, int]:
        """The iterations that the job starts after and ends with."""
        start = layout.parse(self.start)
        done = start.iteration if isinstance(start, layout.Iteration) else 0
        return done, layout.Iteration.parse(self.target).iteration

    def check(self) -> None:
        """Compare the inputs with one another before any process starts.

        Raises:
            ConfigError, DataError, CheckpointError: what does not fit, in a sentence.
        """
        self._check_steps()
        start = files.read_manifest(self.start)
        _check_grid(self.start, start, self.settings)
        model = files.read_json(Path(self.start) / layout.HF_CONFIG)
        for shard, _ in self.shards:
            _check_shard(shard, self.start, model, start["facts"]["tokenizer"])
        files.refuse_foreign(layout.Iteration.parse(self.target))

    def _check_steps(self) -> None:
        """The target is saved, and the start is what the run has before it."""
        found = files.read_json(self.schedule)
        schedule = Schedule(found["train_iters"], found["save_interval"])
        target, start = layout.Iteration.parse(self.target), layout.parse(self.start)
        schedule.check(target.iteration, run=target.run)
        before = schedule.previous(target.iteration)
        if before:
            fits = start == layout.Iteration(run=target.run, iteration=before)
            wanted = f"data/ckpts/{target.run}/iter_{before:07d}"
        else:
            fits = isinstance(start, layout.Sharded) and start.model == self.settings["model"]
            wanted = f"the sharded model {self.settings['model']}"
        if not fits:
            raise ConfigError(f"{target} is trained from {wanted}, not from {start}")


def _check_grid(start: str, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
    if manifest["kind"] not in {"sharded", "iteration"}:
        kind = manifest["kind"]
        raise CheckpointError(f"{start} is of kind {kind!r}; training starts from a sharded model")
    found = manifest["facts"]["grid"]
    want = (settings["tensor_model_parallel_size"], settings["pipeline_model_parallel_size"])
    if (found["tp"], found["pp"]) != want:
        raise CheckpointError(
            f"{start} is cut for tp{found['tp']} x pp{found['pp']}, the run wants tp{want[0]} x pp{want[1]}"
        )


def _check_shard(shard: Path, start: str, model: dict[str, Any], tokenizer: str) -> None:
    """Refuse data that the model was not made for."""
    facts = files.read_manifest(shard, kind="indexed")["facts"]
    if facts["tokenizer"] != tokenizer:
        raise DataError(
            f"{shard} was made by tokenizer {facts['tokenizer'][:12]} of {facts['vocab_size']} tokens, "
            f"{start} has {tokenizer[:12]} of {model['vocab_size']}",
            hint="a mixture's format and a run's model must name the same tokenizer",
        )
    seq, longest = layout.Indexed.parse(shard).seq, model["max_position_embeddings"]
    if seq > longest:
        raise DataError(
            f"{shard} has sequences of {seq} tokens, {start} has max_position_embeddings {longest}",
            hint=f"pack the mixture to at most {longest} tokens",
        )


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold the run's folder: two jobs never write one run.

    Rank 0 holds it, not the process that started the ranks: they may outlive that one.

    Raises:
        CheckpointError: another job holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another job is training in {run}"
            raise CheckpointError(message, hint="wait for it, or end it") from error
        yield


def run_rank(job: Job) -> None:
    """The job on one rank of the world that torchrun started."""
    from plait.train.world import world

    settings = job.settings
    tp, pp = settings["tensor_model_parallel_size"], settings["pipeline_model_parallel_size"]
    with ExitStack() as stack:
        if os.environ["RANK"] == "0":
            stack.enter_context(lock(Path(job.target).parent))
        stack.enter_context(world(tp=tp, pp=pp, seed=settings["seed"]))
        _train(job)


def _train(job: Job) -> None:
    from plait.models.specs import Spec
    from plait.train.build import DTYPES, build_model, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.state import TrainState, save

    hf_config = (Path(job.start) / layout.HF_CONFIG).read_bytes()
    spec = Spec.from_config(json.loads(hf_config))
    inner = build_model(spec, dtype=DTYPES[job.settings["params_dtype"]])
    done, stop = job.steps
    if not done:
        _load_sharded(inner, Path(job.start))
    model = wrap(inner)
    optimizer = optimizer_of(model, job.settings)
    schedule = schedule_of(optimizer, job.settings, train_iters=job.train_iters)
    state = TrainState(inner, optimizer, schedule)
    if done:
        state.load(Path(job.start))
    trainer = Trainer(model, state, _feed(job, spec), job.settings)
    trainer.train(stop, folder=Path(job.target).parent)
    save(
        state,
        Path(job.target),
        spec=spec,
        hf_config=hf_config,
        settings=job.settings,
        inputs=job.inputs,
        tokenizer=files.read_manifest(job.start)["facts"]["tokenizer"],
    )


def _load_sharded(model: Any, folder: Path) -> None:
    from megatron.core import parallel_state

    from plait.convert import checkpoint
    from plait.parallel.grid import Grid
    from plait.train.build import load_weights

    grid = Grid(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
    )
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    load_weights(model, checkpoint.read_rank(folder, grid, tp_rank, pp_rank))


def _feed(job: Job, spec: Any) -> Any:
    """This rank's share of the mixture, in the order that seed and step give."""
    from megatron.core import parallel_state

    from plait.tokens import roles
    from plait.tokens.indexed import PackedShard
    from plait.train.batches import Collator, Feed, Order

    shards = [PackedShard(folder) for folder, _ in job.shards]
    facts, settings = shards[0].facts, job.settings
    total = settings["global_batch_size"]
    collate = Collator(
        seq_length=max(layout.Indexed.parse(folder).seq for folder, _ in job.shards),
        pad_id=facts["eos_id"],
        loss_roles=tuple(roles.CODES[role] for role in settings["loss_roles"]),
        no_loss_ids=tuple(facts["vision"].values()),
        patch_size=facts["patch_size"],
        max_resolution=facts["max_resolution"],
        vision=spec.patch_dim > 0,
        window=spec.sliding_window,
    )
    order = Order(
        weights=tuple(weight for _, weight in job.shards),
        sizes=tuple(len(shard) for shard in shards),
        seed=settings["seed"],
        draws=job.train_iters * total,
    )
    return Feed(
        shards=shards,
        order=order,
        collate=collate,
        micro=settings["micro_batch_size"],
        total=total,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
