"""Writing a ``torch_dist`` checkpoint from the ranks themselves, with equal bytes for equal states.

Megatron Core's own strategy writes through processes it spawns and forks, to go on training
meanwhile, and records a random id and the folder's absolute path in ``.metadata``. A persistent
checkpoint is an artifact: it is written at once, and holds nothing but its content. Each rank writes its
weights in one file and its optimizer's state in another, so that this can be removed without those.
"""

import queue
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from plait.layout import OPTIMIZER


class Writer(FileSystemWriter):
    """Torch's writer, two files a rank, without the id and the path."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items: weights and all else, and the optimizer's apart."""
        files: queue.Queue[Any] = queue.Queue()
        for first in ("", OPTIMIZER):
            items = [item for item in plan.items if (f"{OPTIMIZER}." in item.index.fqn) == bool(first)]
            name = f"{first}{plan.storage_data.prefix}0.distcp"
            if items:
                files.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, files)

    def storage_meta(self) -> StorageMeta | None:
        """Say nothing of where and when."""
        return None


class SaveNow(torch_dist.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron Core's names and shards, written by torch's synchronous saver."""

    def __init__(self) -> None:
        """The format that dist_checkpointing's default loader reads."""
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; rank 0 also writes ``.metadata``."""
        named, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(  # noqa: SLF001
            sharded_state_dict, self.keep_only_main_replica
        )
        save(
            torch_dist.mcore_to_pyt_state_dict(named, is_loading=False),
            storage_writer=Writer(checkpoint_dir),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
