"""One training job: from a sharded model or a checkpoint to the next checkpoint."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plait import files, layout
from plait.config.run import Logging
from plait.config.schedule import Schedule
from plait.errors import CheckpointError, ConfigError, DataError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.tokens.vocabulary import IMAGE
from plait.train.hardware import check_hardware


@dataclass(frozen=True)
class Job:
    """What a job trains, by path; every rank reads the same.

    Attributes:
        start: the sharded model or the checkpoint that it starts from.
        analysis: the mixture's analysis.
        schedule: the run's schedule file.
        target: the checkpoint that it ends with.
        settings: the run's settings.
        logged: what it tells while it trains; nothing of it enters the checkpoint.
    """

    start: str
    analysis: str
    schedule: str
    target: str
    settings: dict[str, Any]
    logged: dict[str, Any] = field(default_factory=lambda: Logging().model_dump(mode="json"))

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
        return [(Path(source["prefix"]), float(source["weight"])) for source in self.mixture["sources"]]

    @property
    def train_iters(self) -> int:
        """The length of the whole run."""
        return int(files.read_json(self.schedule)["train_iters"])

    @property
    def steps(self) -> tuple[int, int]:
        """The iterations that the job starts after and ends with."""
        start, target = layout.parse(self.start), layout.Iteration.parse(self.target)
        goes_on = isinstance(start, layout.Iteration) and (
            start.run == target.run or not self.settings["finetune"]
        )
        return start.iteration if goes_on else 0, target.iteration

    @property
    def grid(self) -> Grid:
        """The grid that the run trains on."""
        return Grid(
            tp=self.settings["tensor_model_parallel_size"],
            pp=self.settings["pipeline_model_parallel_size"],
            first=self.settings["num_layers_in_first_pipeline_stage"],
            last=self.settings["num_layers_in_last_pipeline_stage"],
        )

    @property
    def pieces(self) -> int:
        """What a sequence's length is a multiple of: ranks share it."""
        tensor = self.settings["tensor_model_parallel_size"] if self.settings["sequence_parallel"] else 1
        context = self.settings["context_parallel_size"]
        return tensor * (2 * context if context > 1 else 1)

    @property
    def mixture(self) -> dict[str, Any]:
        """The mixture's sources and their weights."""
        path = Path(self.analysis) / "mixture.yaml"
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found

    def check(self) -> None:
        """Compare the inputs with one another before any process starts.

        Raises:
            ConfigError, DataError, CheckpointError: what does not fit, in a sentence.
        """
        self._check_steps()
        start = files.read_manifest(self.start)
        self._check_grid(start)
        self._check_goes_on(start)
        model = Spec.of(self.start, layout.HF_CONFIG)
        if model.vision is not None:
            _check_energon(self.mixture, self.start, model, start["facts"]["tokenizer"])
        else:
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
        run, iteration = self.settings["start_run"], self.settings["start_iteration"]
        first = 0 if self.settings["finetune"] else iteration
        if before > first:
            wanted = f"data/ckpts/{target.run}/iter_{before:07d}"
            fits = start == layout.Iteration(run=target.run, iteration=before)
        elif run:
            wanted = f"data/ckpts/{run}/iter_{iteration:07d}"
            fits = start == layout.Iteration(run=run, iteration=iteration)
        else:
            wanted = f"the sharded model {self.settings['model']}"
            fits = isinstance(start, layout.Sharded) and start.model == self.settings["model"]
        if not fits:
            raise ConfigError(f"{target} is trained from {wanted}, not from {start}")

    def _check_goes_on(self, manifest: dict[str, Any]) -> None:
        """Who goes on, goes on with the same data: the digest holds tokenizer and template too."""
        if not self.steps[0]:
            return
        trained, now = manifest["inputs"].get(self.analysis), files.digest_of_input(self.analysis)
        if trained != now:
            raise DataError(
                f"{self.start} was trained on {self.analysis} of digest {str(trained)[:12]}, "
                f"it is {now[:12]} now",
                hint="bring back the data it was trained on, or start a run of its own from it by start_run",
            )

    def _check_grid(self, manifest: dict[str, Any]) -> None:
        """A sharded model is cut for one grid; another run's checkpoint is read on any."""
        kind, found = manifest["kind"], manifest["facts"]["grid"]
        if kind not in {"sharded", "iteration"}:
            raise CheckpointError(f"{self.start} is of kind {kind!r}; training starts from a sharded model")
        another_run = kind == "iteration" and layout.parse(self.start).run != layout.parse(self.target).run
        if Grid(**found) != self.grid and not another_run:
            raise CheckpointError(
                f"{self.start} is cut for {Grid(**found)}, the run wants {self.grid}",
                hint="shard the model for that grid, or change the run's parallel sizes in config/",
            )


def _check_energon(mixture: dict[str, Any], start: str, model: Spec, tokenizer: str) -> None:
    """Refuse data that the model was not made for."""
    where = f"the mixture's tokenizer {mixture['tokenizer']}"
    found = files.digest(Path(mixture["tokenizer"]) / "tokenizer.json")
    if found != tokenizer:
        raise DataError(
            f"{where} is {found[:12]}, {start} has {tokenizer[:12]}",
            hint="a mixture's format and a run's model must name the same tokenizer",
        )
    assert model.vision is not None
    picture = files.read_manifest(mixture["tokenizer"], kind="tokenizer")["facts"]["image"].get(IMAGE)
    if picture != model.image_token_id:
        raise DataError(
            f"{where} writes a picture as token {picture}, {start} reads token {model.image_token_id} as one",
            hint="leave image_token_id out of raw_hf, or name the id of <image> there",
        )
    tokens, seq = mixture["format"]["picture_tokens"], mixture["decoder_seq_length"]
    if tokens != model.vision.tokens:
        raise DataError(
            f"the mixture counts {tokens} tokens a picture, the tower of {start} gives {model.vision.tokens}",
            hint="set picture_tokens of the format in config/ to that number",
        )
    _check_length(f"the mixture's decoder_seq_length {seq}", seq, start, model)


def _check_shard(shard: Path, start: str, model: Spec, tokenizer: str) -> None:
    """Refuse data that the model was not made for."""
    facts = files.read_manifest(shard, kind="indexed")["facts"]
    if facts["tokenizer"] != tokenizer:
        raise DataError(
            f"{shard} was made by tokenizer {facts['tokenizer'][:12]} of {facts['vocab_size']} tokens, "
            f"{start} has {tokenizer[:12]} of {model.vocab_size}",
            hint="a mixture's format and a run's model must name the same tokenizer",
        )
    seq = layout.Indexed.parse(shard).seq
    _check_length(f"{shard} has sequences of {seq} tokens", seq, start, model)


def _check_length(what: str, seq: int, start: str, model: Spec) -> None:
    longest = model.max_position_embeddings
    if seq > longest:
        raise DataError(
            f"{what}, {start} has max_position_embeddings {longest}",
            hint=f"shorten the mixture's sequences to at most {longest} tokens",
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

    with ExitStack() as stack:
        if os.environ["RANK"] == "0":
            stack.enter_context(lock(Path(job.target).parent))
        cp, seed = job.settings["context_parallel_size"], job.settings["seed"]
        stack.enter_context(world(tp=job.grid.tp, pp=job.grid.pp, cp=cp, seed=seed))
        _train(job)


def _train(job: Job) -> None:
    import torch

    from plait.train.build import DTYPES, build_model, freeze, optimizer_of, schedule_of, wrap
    from plait.train.figures import flops_per_token
    from plait.train.loop import Trainer
    from plait.train.state import Origin, TrainState, save

    check_hardware(job.settings, gpu=torch.cuda.is_available())
    spec = Spec.of(job.start, layout.HF_CONFIG)
    inner = build_model(spec, job.grid, dtype=DTYPES[job.settings["params_dtype"]], run=job.settings)
    done, stop = job.steps
    if not done:
        _load_start(inner, job, spec)
    freeze(inner, job.settings["freeze"])
    model = wrap(inner, job.settings)
    optimizer = optimizer_of(model, job.settings)
    feed = _feed(job, spec)
    schedule = schedule_of(optimizer, job.settings, train_iters=job.train_iters, sequence=feed.seq_length)
    state = TrainState(inner, optimizer, schedule)
    if done:
        found = files.read_manifest(job.start)["facts"]["grid"]
        state.load(Path(job.start), generators=Grid(**found) == job.grid)
        feed.resume(Path(job.start))
    flops = flops_per_token(spec, feed.seq_length)
    Trainer(model, state, feed, job.settings, job.logged, flops).train(stop, folder=Path(job.target).parent)
    origin = Origin(
        start=Path(job.start),
        spec=spec,
        grid=job.grid,
        settings=job.settings,
        inputs=job.inputs,
        tokenizer=files.read_manifest(job.start)["facts"]["tokenizer"],
    )
    save(state, Path(job.target), origin, loader=feed.state())


def _load_start(model: Any, job: Job, spec: Spec) -> None:
    """The weights of the first segment: drawn, of another run's checkpoint, or of the sharded model."""
    from megatron.core import parallel_state

    from plait.convert import checkpoint, engine
    from plait.models.common import drawn
    from plait.train.build import load_weights
    from plait.train.state import load_model

    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    if job.settings["init"] == "random":
        random = drawn(spec.shapes, std=job.settings["init_method_std"], seed=job.settings["seed"])
        load_weights(model, engine.cut(engine.to_mcore(random, spec), spec, job.grid, *place))
    elif job.settings["start_run"]:
        load_model(model, Path(job.start))
    else:
        load_weights(model, checkpoint.read_rank(Path(job.start), job.grid, *place))


def _feed(job: Job, spec: Spec) -> Any:
    """This rank's share of the mixture, in the order that seed and step give."""
    from megatron.core import parallel_state

    place = {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    return _packed(job, spec, **place) if spec.vision is None else _energon(job, spec, **place)


def _packed(job: Job, spec: Spec, *, dp_rank: int, dp_size: int) -> Any:
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
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def _energon(job: Job, spec: Spec, *, dp_rank: int, dp_size: int) -> Any:
    from megatron.core import parallel_state

    from plait.train.energon import EnergonFeed, PictureCollator, image_processor

    first = parallel_state.is_pipeline_first_stage()
    mixture = job.mixture
    collate = PictureCollator(
        seq_length=mixture["decoder_seq_length"],
        fixed=job.grid.pp > 1,
        multiple=job.pieces,
        processor=image_processor(Path(job.start)) if first else None,
        window=spec.sliding_window,
    )
    return EnergonFeed(
        blend=Path(job.analysis) / "metadataset.yaml",
        tokenizer=Path(mixture["tokenizer"]),
        form=mixture["format"],
        collate=collate,
        run=job.settings,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
