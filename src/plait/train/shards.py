"""What Megatron Core writes of a state, rank by rank: its names and shards, planned by torch's rules."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.utils import _DistWrapper

from plait.train.writer import Share


class _Planned(torch_dist.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron Core's strategy up to where data are written."""

    share: Share

    def __init__(self) -> None:
        """The format that dist_checkpointing's default loader reads."""
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Share out among the ranks what is to be written."""
        named, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(  # noqa: SLF001
            sharded_state_dict, self.keep_only_main_replica
        )
        planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        ranks = _DistWrapper(None, use_dist=True, coordinator_rank=0)
        planner.set_up_planner(
            torch_dist.mcore_to_pyt_state_dict(named, is_loading=False), is_coordinator=ranks.is_coordinator
        )
        metadata = None

        def of_all(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = planner.create_global_plan(plans)
            return plans

        plan = planner.finish_plan(ranks.reduce_scatter("plan", planner.create_local_plan, of_all))
        items = [(item, planner.resolve_data(item)) for item in plan.items]
        self.share = Share(Path(checkpoint_dir), dist.get_rank(), dist.get_world_size(), items, metadata)


def _interned(value: Any) -> Any:
    """The value with one object for equal strings: pickles of equal states are then equal bytes."""
    if isinstance(value, dict):
        return {_interned(key): _interned(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_interned(one) for one in value]
    return sys.intern(value) if type(value) is str else value


def planned(state: dict[str, Any], part: Path) -> Share:
    """What this rank has to write of a state by global tensors; all ranks take part.

    Rank 0 also writes what is common to all, ``common.pt`` and ``metadata.json``, which is little.
    """
    strategy = _Planned()
    dist_checkpointing.save(_interned(state), str(part), strategy)
    return strategy.share
