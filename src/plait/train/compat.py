"""Megatron Core 0.16.1 on a machine without CUDA: gloo and the CPU, with the same training code.

Megatron Core spells the CUDA device in places that a CPU run reaches. Each function below mends one
kind of place, says why, and is a no-op where CUDA is present; that of the router, where Transformer Engine
is. The patched places are listed by name: if a new Megatron Core moves one, ``install`` fails and names it.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from plait.train.kernels import rotated

MEGATRON = "0.16.1"

# Functions that reach a literal device or tensor type: module, then names in it.
LITERALS: dict[str, tuple[str, ...]] = {
    "megatron.core.pipeline_parallel.schedules": (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ),
    "megatron.core.optimizer.clip_grads": (
        "get_grad_norm_fp32",
        "clip_grad_by_total_norm_fp32",
        "count_zeros_fp32",
    ),
    "megatron.core.optimizer.optimizer": (
        "MixedPrecisionOptimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "FP32Optimizer.__init__",
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ),
    "megatron.core.transformer.utils": ("get_default_causal_mask",),
    "megatron.core.utils": ("local_multi_tensor_l2_norm",),
}
SPELLINGS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


@cache
def install() -> None:
    """Make Megatron Core run on this machine. Call it before building anything.

    Raises:
        RuntimeError: this Megatron Core is not the one that the patches were made for.
    """
    router_knows_of_no_engine()
    if torch.cuda.is_available():
        return
    found = version("megatron-core")
    if found != MEGATRON:
        raise RuntimeError(f"the CPU path is made for megatron-core {MEGATRON}, found {found}")
    current_device_is_the_cpu()
    random_state_is_the_cpu_generator()
    literal_devices_are_the_cpu()
    adam_counts_by_group()
    heads_are_turned_in_place()


def router_knows_of_no_engine() -> None:
    """The router asks for Transformer Engine's product by a name that only importing that engine defines."""
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not utils.HAVE_TE:
        vars(utils).setdefault("te_general_gemm", None)


def current_device_is_the_cpu() -> None:
    """Buffers are made on ``torch.cuda.current_device()`` and batches moved by ``.cuda()``."""
    cpu = torch.device("cpu")
    _replace(torch.cuda, "current_device", lambda: cpu)
    _replace(torch.cuda, "synchronize", lambda *_, **__: None)
    _replace(torch.Tensor, "cuda", lambda self, *_, **__: self)
    _replace(torch.nn.Module, "cuda", lambda self, *_, **__: self)


def random_state_is_the_cpu_generator() -> None:
    """Dropout and initialisation fork named CUDA generator states; the CPU has one generator."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    _replace(torch.cuda, "get_rng_state", get_state)
    _replace(torch.cuda, "manual_seed", torch.default_generator.manual_seed)
    _replace(random, "_get_cuda_rng_state", get_state)
    _replace(random, "_set_cuda_rng_state", set_state)
    _replace(random.CudaRNGStatesTracker, "fork", _fork_cpu_state)


@contextlib.contextmanager
def _fork_cpu_state(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Run on the named state and put the outer one back (upstream warns: the outer one is the CPU's)."""
    outer = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


class GroupAdam(torch.optim.Optimizer):
    """Torch's AdamW whose parameter groups count their steps, as Apex's FusedAdam does.

    Megatron's distributed optimizer loads torch's own with one shared step tensor for all parameters, which
    each of them then advances.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
    ) -> None:
        """Take what Megatron gives Apex's."""
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every group."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._adamw(group, [(p, p.grad) for p in group["params"] if p.grad is not None])

    def _adamw(self, group: dict[str, Any], found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        from torch.optim.adamw import adamw

        for parameter, _ in found:
            if not self.state[parameter]:
                moments = ("exp_avg", "exp_avg_sq")
                self.state[parameter] = {name: torch.zeros_like(parameter) for name in moments}
        parameters, gradients = [one for one, _ in found], [one for _, one in found]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [torch.tensor(float(group["step"] - 1), device=one.device) for one in parameters],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def adam_counts_by_group() -> None:
    """Without Apex or Transformer Engine, Megatron takes torch's AdamW: see :class:`GroupAdam`."""
    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    for owner, name, value in (
        (optimizer, "Adam", GroupAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distributed, "Adam", GroupAdam),
        (distributed, "HAVE_APEX_OR_TE", True),
        (distributed, "USING_APEX_OPTIMIZER", True),
    ):
        _replace(owner, name, value)


def heads_are_turned_in_place() -> None:
    """Megatron's fused rotary embedding is a kernel of a GPU, and the other one joins halves four times."""
    embeddings = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    _replace(embeddings, "_apply_rotary_pos_emb_bshd", rotated)


def literal_devices_are_the_cpu() -> None:
    """Some functions spell ``device='cuda'`` or a CUDA tensor type: change those constants in them."""
    for module_name, names in LITERALS.items():
        module = importlib.import_module(module_name)
        for name in names:
            function = _function(module, name)
            code = _respelled(function.__code__)
            if code is function.__code__:
                raise RuntimeError(f"{module_name}.{name} spells no CUDA device: review compat.LITERALS")
            function.__code__ = code


def _function(module: types.ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise RuntimeError(f"{module.__name__}.{name} is gone: review compat.LITERALS")
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return getattr(found, "__func__", found)


def _respelled(code: types.CodeType) -> types.CodeType:
    constants = tuple(_respell(constant) for constant in code.co_consts)
    return code if constants == code.co_consts else code.replace(co_consts=constants)


def _respell(constant: Any) -> Any:
    if isinstance(constant, str):
        return SPELLINGS.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_respell(part) for part in constant)
    return _respelled(constant) if isinstance(constant, types.CodeType) else constant


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise RuntimeError(f"{owner.__name__}.{name} is gone: review compat.py")
    setattr(owner, name, value)
