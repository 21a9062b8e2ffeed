"""Keys of a run that this machine has no hardware for: each is refused by name, none is left out silently."""

from collections.abc import Mapping
from typing import Any

from plait.config.run import needs_engine
from plait.errors import ConfigError

NEEDS_GPU: dict[str, tuple[Any, str]] = {
    "cpu_offloading_num_layers": (0, "Transformer Engine's layers"),
    "moe_token_dispatcher_type": ("allgather", "CUDA streams"),
    "optimizer_cpu_offload": (False, "a device that the optimizer's state can be moved from"),
}
"""Keys that need a GPU where they differ from this value, and what they reach there."""


def check_hardware(run: Mapping[str, Any], *, gpu: bool) -> None:
    """Refuse keys that this machine could only ignore.

    Args:
        run: the run's settings.
        gpu: whether there is one.

    Raises:
        ConfigError: it names the key.
    """
    unread = needs_engine(run)
    if unread:
        raise ConfigError(unread, hint="leave it out")
    if gpu:
        return
    for key, (without, what) in NEEDS_GPU.items():
        if run[key] != without:
            raise ConfigError(
                f"{key} {run[key]!r} needs a GPU ({what}), and this machine has none",
                hint=f"leave {key} out, or train where there is one",
            )
    if run["params_dtype"] == "fp16":
        raise ConfigError(
            "params_dtype 'fp16' needs a GPU: Megatron scales its losses there only",
            hint="use bf16, or fp32",
        )
