"""How evenly a mixture of experts deals out its tokens, as Megatron's balancing loss measures it."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)


def balance(batches: int) -> dict[str, float]:
    """The mean of a layer's balancing loss, without its weight, since it was asked last; 1 is even.

    Every rank calls it. Ranks that share a sequence have each a part of its loss, those of other stages other
    layers, those of other copies other micro-batches: all of them add up. Megatron's own sum over ranks takes
    a mean that gloo has not.

    Args:
        batches: micro-batches of all copies since then.
    """
    values = torch.stack([found["values"] for found in get_moe_layer_wise_logging_tracker().values()])
    total = values.sum()
    dist.all_reduce(total)
    clear_aux_losses_tracker()
    return {"load balancing loss": total.item() / (values.shape[1] * batches)}
