"""Keys of a run that this machine cannot heed: each is refused by name, none is left out silently."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from plait.config.run import FUSED, needs_engine
from plait.errors import ConfigError

NEEDS_GPU: dict[str, tuple[Any, str]] = {
    "transformer_impl": ("local", "Transformer Engine's kernels"),
    "moe_token_dispatcher_type": ("allgather", "CUDA streams"),
    "optimizer_cpu_offload": (False, "a device that the optimizer's state can be moved from"),
    **dict.fromkeys(FUSED, (False, "a kernel of its own")),
}
"""Keys that need a GPU where they differ from this value, and what they reach there."""
NEEDS_PACKAGE = {
    "transformer_impl": "transformer_engine",
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
}
"""Keys that need a package too, where they need a GPU; images have the latter as a part of Apex."""


def installed(package: str) -> bool:
    """Whether an environment has a package; it is not imported, which could fail where it is broken."""
    return find_spec(package) is not None


def check_engine(run: Mapping[str, Any]) -> None:
    """Refuse what only Transformer Engine's layers could heed, where these are not used.

    Raises:
        ConfigError: it names the key.
    """
    unread = needs_engine(run)
    if unread:
        raise ConfigError(unread, hint="leave it out, or set `transformer_impl: transformer_engine`")


def check_hardware(run: Mapping[str, Any], *, gpu: bool, has: Callable[[str], bool] | None = None) -> None:
    """Refuse keys that this machine could only ignore.

    Args:
        run: the run's settings.
        gpu: whether there is one.
        has: whether a package is installed; :func:`installed` by itself.

    Raises:
        ConfigError: it names the key, and what is missing.
    """
    check_engine(run)
    has = has or installed
    for key, (without, what) in NEEDS_GPU.items():
        if run[key] == without:
            continue
        if not gpu:
            raise ConfigError(
                f"{key} {run[key]!r} needs a GPU ({what}), and this machine has none",
                hint=f"leave {key} out, or train where there is one",
            )
        package = NEEDS_PACKAGE.get(key)
        if package and not has(package):
            raise ConfigError(
                f"{key} {run[key]!r} needs the package {package}, which this environment does not have",
                hint=f"leave {key} out, or train in an image that has it, see `images.gpu`",
            )
    if not gpu and run["params_dtype"] == "fp16":
        raise ConfigError(
            "params_dtype 'fp16' needs a GPU: Megatron scales its losses there only",
            hint="use bf16, or fp32",
        )
