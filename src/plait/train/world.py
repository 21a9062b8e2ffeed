"""The processes of a job: the only place that starts and ends process groups."""

import math
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from plait.train import compat


@contextmanager
def world(
    *,
    tp: int,
    pp: int,
    seed: int,
    cp: int = 1,
    chunks: int | None = None,
    ep: int = 1,
    rendezvous: str | None = None,
    minutes: int = 30,
) -> Iterator[None]:
    """Join the processes that torchrun, or a test, has started, as a tp x cp x dp x pp grid.

    Args:
        tp: tensor model parallel size.
        pp: pipeline model parallel size; what is left of the world is data parallel.
        cp: context parallel size.
        chunks: virtual pipeline model parallel size.
        ep: expert parallel size: of the cp x dp processes, so many share the experts.
        seed: seed of every generator; tensor parallel ranks get their own beside it.
        minutes: how long a process waits for the others.
        rendezvous: where the processes meet, if not where torchrun says; ``file://...`` needs no port.
    """
    warnings.filterwarnings("ignore", module="megatron")
    compat.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    gpu = torch.cuda.is_available()
    if gpu:
        place = int(os.environ.get("LOCAL_RANK") or int(os.environ["RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(place)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=rendezvous,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(minutes=minutes),
    )
    try:
        parallel_state.initialize_model_parallel(
            tp, pp, chunks, context_parallel_size=cp, expert_model_parallel_size=ep
        )
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - Megatron Core reads the global generator
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _Elsewhere:
    """A group of pipeline stages of which this process is one, and the others are not there."""

    def __init__(self, stage: int, stages: int) -> None:
        self._place = stage, stages

    def rank(self) -> int:
        return self._place[0]

    def size(self) -> int:
        return self._place[1]


@contextmanager
def as_stage(stage: int, stages: int) -> Iterator[None]:
    """Build, load and compute as a stage of a pipeline whose others do not exist: nothing is sent to them.

    Args:
        stage: its number.
        stages: how many there would be.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()

    def take(group: Any, rank: int | None, size: int | None) -> None:
        parallel_state._PIPELINE_MODEL_PARALLEL_GROUP = group  # noqa: SLF001 - no function sets it
        parallel_state.set_pipeline_model_parallel_rank(rank)
        parallel_state.set_pipeline_model_parallel_world_size(size)

    take(_Elsewhere(stage, stages), stage, stages)
    try:
        yield
    finally:
        take(group, None, None)


@contextmanager
def alone(
    place: int, tp: int, pp: int, *, cp: int = 1, chunks: int | None = None, ep: int = 1, expert: int = 0
) -> Iterator[None]:
    """Take the place of one rank of a grid among others that do not exist: nothing is sent.

    Args:
        place: the rank among those that hold one copy of the model, tensor ranks fastest.
        tp: tensor model parallel size.
        pp: pipeline model parallel size.
        cp: context parallel size.
        chunks: virtual pipeline model parallel size.
        ep: expert parallel size.
        expert: the rank among those that share the experts.
    """
    compat.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    stage, rank = divmod(place, tp)
    copies = math.lcm(cp, ep)
    here = (stage * copies + expert) * tp + rank
    dist.init_process_group("fake", store=FakeStore(), rank=here, world_size=tp * pp * copies)
    try:
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            chunks,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
