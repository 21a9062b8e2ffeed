"""What one rank of a training job does, from its start to the checkpoint it ends with."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait import files, layout
from plait.config.run import AXES, attends_by_documents
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train import debug, lease, lineage
from plait.train.hardware import check_hardware
from plait.train.job import Job
from plait.train.kept import Kept

if TYPE_CHECKING:
    from plait.train.saves import Saves
    from plait.train.writer import Origin

SAME_RANKS = (*AXES, "expert_model_parallel_size", "version")
"""Keys of a checkpoint that decide which rank each state of a generator belongs to."""


def run_rank(job: Job) -> None:
    """The job on one rank of the world; it ends with its checkpoints, or with a state if asked to stop."""
    import torch

    from plait.train.world import world

    check_hardware(job.settings, gpu=torch.cuda.is_available())
    with ExitStack() as stack:
        allowed: Callable[[], None] = lambda: None  # noqa: E731
        if os.environ["RANK"] == "0" and not job.around["debug"]:
            allowed = stack.enter_context(lease.hold(Path(str(job.run)))).check
        seed, minutes = job.settings["seed"], job.around["distributed_timeout_minutes"]
        stack.enter_context(world(**axes(job), seed=seed, minutes=minutes))
        _train(job, allowed)


def axes(job: Job) -> dict[str, Any]:
    """How the processes of a job are shared out; what is left of them is data parallel."""
    return {
        "tp": job.grid.tp,
        "pp": job.grid.pp,
        "cp": job.settings["context_parallel_size"],
        "ep": job.settings["expert_model_parallel_size"],
        "chunks": job.settings["virtual_pipeline_model_parallel_size"],
    }


def _train(job: Job, allowed: Callable[[], None]) -> None:
    import torch.distributed as dist

    from plait.train.build import DTYPES, build_chunks, freeze, optimizer_of, schedule_of, wrap
    from plait.train.figures import flops_per_token
    from plait.train.loop import Trainer
    from plait.train.state import TrainState

    spec, dtype = Spec.of(job.start, layout.HF_CONFIG), DTYPES[job.settings["params_dtype"]]
    if job.settings["tp_comm_overlap"]:
        from plait.train.engine import share_buffers

        share_buffers(job.settings, job.mixture.sequence, spec.hidden_size, dtype)
    chunks = build_chunks(spec, job.grid, dtype=dtype, run=job.settings)
    kept = Kept(job)
    if dist.get_rank() == 0 and not job.around["debug"]:
        lineage.begin(job)
        kept.thin_out()
    before, same_ranks = _goes_on_from(job, kept)
    if before is None:
        _load_start(chunks, job, spec)
    freeze(chunks, job.settings["freeze"])
    model = wrap(chunks, job.settings)
    optimizer = optimizer_of(model, job.settings)
    feed = _feed(job, spec, before)
    evaluation = _feed(job, spec, before, evaluates=True) if job.around["eval_interval"] else None
    schedule = schedule_of(optimizer, job.settings, train_iters=job.train_iters, sequence=feed.seq_length)
    state = TrainState(chunks, optimizer, schedule)
    if before is not None:
        state.load(before, generators=same_ranks, optimizer=job.takes_optimizer(before))
        feed.resume(before)
    origin, saves = _origin(job, spec), _saves(job, kept, allowed)

    def keep(goes_on: bool) -> None:
        saves.settle()
        done = state.iteration
        inputs = kept.inputs(done) if dist.get_rank() == 0 else {}
        saved = replace(origin, inputs=inputs)
        if done not in kept.saves:
            saved = replace(saved, kind="state", facts={**origin.facts, "train_iters": job.train_iters})
        saves.save(state, kept.path(done), saved, feed.state(), goes_on=goes_on)

    trainer = Trainer(
        model=model,
        state=state,
        feed=feed,
        run=job.settings,
        around=job.around,
        flops=flops_per_token(spec, feed.seq_length, freeze=job.settings["freeze"]),
        evaluation=evaluation,
        length=job.train_iters,
        saves=kept.saves,
    )
    if job.around["debug"]:
        debug.session(trainer)
        return
    with saves:
        done = trainer.train(job.steps[1], folder=Path(str(job.run)), keep=keep, saving=saves)
    if done and dist.get_rank() == 0:
        allowed()
        kept.publish()
    dist.barrier()


def _origin(job: Job, spec: Spec) -> "Origin":
    """What checkpoints of the job say of where they are from."""
    from plait.train.writer import Origin

    return Origin(
        start=Path(job.start),
        spec=spec,
        grid=job.grid,
        settings=job.settings,
        inputs={},
        tokenizer=files.read_manifest(job.start)["facts"]["tokenizer"],
        facts=files.stamp(job.start),
    )


def _saves(job: Job, kept: Kept, allowed: Callable[[], None]) -> "Saves":
    """How the job saves: old states go once a newer one is in place."""
    from plait.train.saves import Saves

    return Saves(beside=job.around["async_save"], allowed=allowed, placed=kept.prune)


def _goes_on_from(job: Job, kept: Kept) -> tuple[Path | None, bool]:
    """The state or checkpoint that training goes on from, if any, and whether its generators fit the ranks.

    Rank 0 looks for states: it holds the lease, so nobody writes or removes one meanwhile.
    """
    import torch
    import torch.distributed as dist

    if job.around["debug"]:
        return None, False
    found = kept.newest() if dist.get_rank() == 0 else 0
    iteration = torch.tensor([found], device=torch.cuda.current_device())
    dist.broadcast(iteration, src=0)
    if iteration.item():
        return kept.path(int(iteration.item())), True
    job.check_whole()
    if dist.get_rank() == 0:
        job.check_undamaged()
    dist.barrier()
    if not job.steps[0]:
        return None, False
    manifest = files.read_manifest(job.start)
    same = all(manifest["settings"].get(key) == job.settings.get(key) for key in SAME_RANKS)
    return Path(job.start), same and Grid(**manifest["facts"]["grid"]) == job.grid


def _load_start(chunks: list[Any], job: Job, spec: Spec) -> None:
    """The weights of the first segment: drawn, of another run's checkpoint, or of the sharded model."""
    from megatron.core import parallel_state

    from plait.convert import checkpoint, engine, layouts
    from plait.convert.torch_dist import METADATA
    from plait.models.common import drawn
    from plait.train.build import load_cut, load_weights, own
    from plait.train.state import load_model

    start = Path(job.start)
    if job.settings["init"] == "random":
        random = drawn(spec.shapes, std=job.settings["init_method_std"], seed=job.settings["seed"])
        load_cut(chunks, engine.to_mcore(random, spec), spec, job.grid)
    elif job.settings["start_run"] and (start / METADATA).is_file():
        load_model(chunks, start)
    elif job.settings["start_run"]:
        load_cut(chunks, layouts.whole(layouts.trained(start, spec), spec), spec, job.grid)
    elif job.around["debug"]:
        load_cut(chunks, layouts.whole(layouts.released(start, spec), spec), spec, job.grid)
    elif len(chunks) > 1:  # the layers of a rank's chunks stand in several ranks' files
        load_cut(chunks, layouts.whole(layouts.released(start, spec, job.grid), spec), spec, job.grid)
    else:
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        load_weights(chunks[0], own(checkpoint.read_rank(start, job.grid, *place), spec, job.grid, place[1]))


def _feed(job: Job, spec: Spec, before: Path | None, *, evaluates: bool = False) -> Any:
    """This rank's share of what is trained, in the order that seed and step give; or of what is evaluated."""
    from megatron.core import parallel_state

    place = {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    if spec.vision is None:
        return _packed(job, spec, evaluates=evaluates, **place)
    return _energon(job, spec, evaluates=evaluates, streams=job.streams(before), **place)


def _packed(job: Job, spec: Spec, *, evaluates: bool, dp_rank: int, dp_size: int) -> Any:
    from plait.tokens import roles
    from plait.tokens.indexed import PackedShard
    from plait.train.batches import Collator, Feed, Order

    found = (job.evaluated if evaluates else job.mixture).shards
    shards = [PackedShard(folder) for folder, _ in found]
    facts, settings = shards[0].facts, job.settings
    total = settings["global_batch_size"]
    batches = job.around["eval_iters"] if evaluates else job.train_iters
    collate = Collator(
        seq_length=max(layout.Indexed.parse(folder).seq for folder, _ in found),
        pad_id=facts["eos_id"],
        loss_roles=tuple(roles.CODES[role] for role in settings["loss_roles"]),
        no_loss_ids=tuple(facts["vision"].values()),
        patch_size=facts["patch_size"],
        max_resolution=facts["max_resolution"],
        vision=spec.patch_dim > 0,
        window=spec.sliding_window,
        by_documents=attends_by_documents(settings),
    )
    order = Order(
        weights=tuple(weight for _, weight in found),
        sizes=tuple(len(shard) for shard in shards),
        seed=settings["seed"],
        draws=batches * total,
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


def _energon(job: Job, spec: Spec, *, evaluates: bool, dp_rank: int, dp_size: int, streams: int) -> Any:
    from megatron.core import parallel_state

    from plait.train.energon import EnergonFeed, EvaluationFeed, PictureCollator, image_processor

    first = parallel_state.is_pipeline_first_stage()
    source = job.evaluated if evaluates else job.mixture
    mixture = source.content
    facts = files.read_manifest(mixture["tokenizer"], kind="tokenizer")["facts"]
    collate = PictureCollator(
        seq_length=mixture["decoder_seq_length"],
        fixed=job.grid.pp > 1 or job.settings["tp_comm_overlap"],
        pad_id=facts["eos_id"] if spec.pad_token_id is None else spec.pad_token_id,
        multiple=job.pieces,
        processor=image_processor(Path(job.start)) if first else None,
        window=spec.sliding_window,
        by_documents=attends_by_documents(job.settings),
    )
    return (EvaluationFeed if evaluates else EnergonFeed)(
        blend=source.folder / "metadataset.yaml",
        tokenizer=Path(mixture["tokenizer"]),
        image_token_id=spec.image_token_id,
        form=mixture["format"],
        collate=collate,
        run=job.settings,
        dp_rank=dp_rank,
        dp_size=dp_size,
        streams=streams,
    )
