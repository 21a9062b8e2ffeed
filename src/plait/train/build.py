"""From an HF model's shape and a run's settings to Megatron Core's model, optimizer and schedule."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from plait.config.run import FUSED, attends_by_documents
from plait.config.schedule import warmup_iters
from plait.convert.engine import cut, own_experts
from plait.convert.tables import engine_name
from plait.convert.torch_dist import EXTRA
from plait.errors import CheckpointError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.tokens.vocabulary import padded_vocab_size
from plait.train.llava import LlavaModel, VisionTower, projector_of, projector_sizes, tower_sizes
from plait.train.model import PackedGPTModel
from plait.train.modules import language_blocks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRANSFORMER = (
    "context_parallel_size", "sequence_parallel", "recompute_granularity", "recompute_method",
    "recompute_num_layers", "hidden_dropout", "attention_dropout", "deterministic_mode", "fp8",
    "fp8_amax_compute_algo", "fp8_amax_history_len", "expert_model_parallel_size",
    "moe_router_load_balancing_type", "moe_token_dispatcher_type", "moe_grouped_gemm",
    "transformer_impl", "tp_comm_overlap", *FUSED,
)  # fmt: skip
"""Keys of a run that Megatron's ``TransformerConfig`` has too; a tower heeds no parallel ones of them."""
DDP = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
OPTIMIZER = (
    "optimizer", "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum",
    "clip_grad", "use_distributed_optimizer", "overlap_param_gather", "loss_scale", "initial_loss_scale",
    "loss_scale_window", "hysteresis", "optimizer_cpu_offload", "optimizer_offload_fraction",
)  # fmt: skip


def loaded_later(weight: torch.Tensor) -> torch.Tensor:
    """Leave a weight as it is: a checkpoint fills it.

    ``perform_initialization=False`` would skip more than that: Megatron then does not mark tensor
    parallel weights as such, and its gradient norm takes those of all ranks but the first for copies.
    """
    return weight


def transformer_config(
    spec: Spec, grid: Grid, *, dtype: torch.dtype, run: Mapping[str, Any] = MappingProxyType({}), **sizes: Any
) -> TransformerConfig:
    """Megatron's config of a model of this shape on a grid; kernels are fused as the run says.

    One that Megatron has is never: its fused softmax takes "causal" for all of a mask, and a document would
    see those before it.

    Args:
        spec: the language model's shape.
        grid: the current grid.
        dtype: type of weights and activations.
        run: the run's settings; without them nothing is dropped, computed again or shared.
        sizes: keys of a part that is not the language model, in place of its.
    """
    chosen: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "transformer_impl": "local"}
    if not sizes:
        chosen |= {key: run[key] for key in TRANSFORMER if key in run}
        chosen |= _offloading(run) | _interleaving(run) | _balancing(run, grid) | _windowed(run, spec)
        chosen |= {"attention_backend": AttnBackend[run.get("attention_backend", "auto")]}
    return TransformerConfig(
        **(sizes or _language_sizes(spec, grid)) | chosen,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=grid.tp,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        init_method=loaded_later,
        output_layer_init_method=loaded_later,
        embedding_init_method=loaded_later,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _language_sizes(spec: Spec, grid: Grid) -> dict[str, Any]:
    uneven = grid.pp > 1
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_key_value_heads,
        "kv_channels": spec.head_dim,
        "ffn_hidden_size": spec.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": spec.attention_bias,
        "qk_layernorm": spec.qk_norm,
        "gated_linear_unit": True,
        **(_expert_sizes(spec, grid) if spec.num_experts else {}),
        "activation_func": F.silu,
        "pipeline_model_parallel_size": grid.pp,
        "num_layers_in_first_pipeline_stage": grid.first if uneven else None,
        "num_layers_in_last_pipeline_stage": grid.last if uneven else None,
    }


def _expert_sizes(spec: Spec, grid: Grid) -> dict[str, Any]:
    """Mixtral's router: the softmax of the chosen logits, which is transformers' renormalised one.

    Experts of several tensor ranks gather their tokens by sequence: Megatron has no other way.
    """
    return {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.intermediate_size,
        "sequence_parallel": grid.tp > 1,
    }


def _offloading(run: Mapping[str, Any]) -> dict[str, Any]:
    layers = run.get("cpu_offloading_num_layers", 0)
    return {"cpu_offloading": True, "cpu_offloading_num_layers": layers} if layers else {}


def _windowed(run: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """How many tokens before its own a token sees, where no mask says it."""
    window = spec.sliding_window
    return {"window_size": (window - 1, 0)} if window and attends_by_documents(run) else {}


def _balancing(run: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """The weight of the balancing loss, as one process would have it.

    Megatron scales each rank's part of that loss by the rank's own tokens, where gradients are finalised per
    token; ranks that share a sequence then have it too small by their number.
    """
    coefficient = run.get("moe_aux_loss_coeff")
    ranks = grid.tp * run.get("context_parallel_size", 1)
    return {"moe_aux_loss_coeff": coefficient * ranks} if coefficient else {}


def _interleaving(run: Mapping[str, Any]) -> dict[str, Any]:
    """Chunks of a stage, whose messages go one by one.

    In a batch the two of a pair of stages, which are each other's next and previous, would be mixed up.
    """
    chunks = run.get("virtual_pipeline_model_parallel_size")
    if chunks is None:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": chunks,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def build_chunks(
    spec: Spec, grid: Grid, *, dtype: torch.dtype, run: Mapping[str, Any] = MappingProxyType({})
) -> list[PackedGPTModel | LlavaModel]:
    """This rank's chunks of the model, in order; one where no pipeline is interleaved."""
    chunks = run.get("virtual_pipeline_model_parallel_size")
    numbers = range(chunks) if chunks else [None]
    return [build_model(spec, grid, dtype=dtype, run=run, chunk=number) for number in numbers]


def build_model(
    spec: Spec,
    grid: Grid,
    *,
    dtype: torch.dtype,
    run: Mapping[str, Any] = MappingProxyType({}),
    chunk: int | None = None,
) -> PackedGPTModel | LlavaModel:
    """This rank's stage of the model, or a chunk of it; its weights are not initialised, they are loaded."""
    config = transformer_config(spec, grid, dtype=dtype, run=run)
    language = _language_model(spec, config, chunk, by_documents=attends_by_documents(run))
    if spec.vision is None or spec.projector is None:
        return language
    if not language.pre_process:
        return LlavaModel(language)
    tower = transformer_config(spec, grid, dtype=dtype, **tower_sizes(spec.vision))
    sizes = projector_sizes(spec.projector, spec.num_attention_heads)
    projector = transformer_config(spec, grid, dtype=dtype, **sizes)
    return LlavaModel(language, (VisionTower(tower, spec.vision), projector_of(projector, spec.projector)))


def _language_model(
    spec: Spec, config: TransformerConfig, chunk: int | None, *, by_documents: bool
) -> PackedGPTModel:
    """The language model; its experts have an optimizer of their own.

    Megatron gives them one (and marks them so) only if they are dealt out; with one always, a checkpoint of
    any expert parallel size has the parts that any other looks for.
    """
    model = PackedGPTModel(
        config,
        language_blocks(config, chunk, by_documents=by_documents),
        vocab_size=padded_vocab_size(spec.vocab_size, config.tensor_model_parallel_size),
        true_vocab_size=spec.vocab_size,
        max_sequence_length=spec.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        parallel_output=True,
        scatter_embedding_sequence_parallel=False,
        share_embeddings_and_output_weights=spec.tied,
        rotary_base=spec.rope_theta,
        rope=spec.rope,
        patch_dim=spec.patch_dim,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
    return model


def layers_of(spec: Spec, grid: Grid, stage: int) -> range:
    """The layers that Megatron gives to a stage."""
    config = transformer_config(spec, grid, dtype=torch.float32)
    first = get_transformer_layer_offset(config, pp_rank=stage)
    return range(first, first + get_num_layers_to_build(config, pp_rank=stage))


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load this rank's weights, by Megatron Core's own names or by those that the model has.

    What Transformer Engine's layers remember of fp8 stays, where it is not among them.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape is another.
    """
    own = model.state_dict()
    remembered = {name: value for name, value in own.items() if EXTRA in name}
    found = {name if name in own else engine_name(name): value for name, value in weights.items()}
    try:
        model.load_state_dict(remembered | found, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit this rank's model: {error}") from error


def load_cut(
    chunks: Sequence[torch.nn.Module], whole: Mapping[str, torch.Tensor], spec: Spec, grid: Grid
) -> None:
    """Load this rank's chunks from Megatron's whole tensors.

    Raises:
        CheckpointError: as :func:`load_weights`.
    """
    tp = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    cut_for = grid.interleaved(len(chunks))
    for number, chunk in enumerate(chunks):
        place = number * grid.pp + stage
        load_weights(chunk, own(cut(whole, spec, cut_for, tp, place), spec, cut_for, place))


def own(state: Mapping[str, torch.Tensor], spec: Spec, grid: Grid, stage: int) -> Mapping[str, torch.Tensor]:
    """What this expert parallel rank holds of a stage."""
    return own_experts(
        state,
        spec=spec,
        grid=grid,
        pp_rank=stage,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
    )


def freeze(chunks: Sequence[PackedGPTModel | LlavaModel], parts: Sequence[str]) -> None:
    """Leave parts of a LLaVA model untrained; call it before the optimizer is made.

    Args:
        chunks: this rank's.
        parts: of ``language_model``, ``vision_model`` and ``vision_projection``.
    """
    for chunk in chunks:
        for part in parts:
            module = getattr(chunk, part, None)
            if module is not None:
                module.requires_grad_(requires_grad=False)


def wrap(
    chunks: Sequence[PackedGPTModel | LlavaModel], run: Mapping[str, Any] = MappingProxyType({})
) -> list[DistributedDataParallel]:
    """Each chunk on this rank's device, behind Megatron's data parallel gradients.

    Those of later chunks are reduced in one piece: while they are, an earlier chunk computes.
    """
    return [
        DistributedDataParallel(
            chunk.config, ddp_config(run), _in_its_type(chunk.cuda()), disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]


def _in_its_type(chunk: PackedGPTModel | LlavaModel) -> torch.nn.Module:
    config = chunk.config
    return Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk


def ddp_config(run: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """How Megatron reduces gradients; they are summed in fp32."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, **{key: run[key] for key in DDP if key in run}
    )


def optimizer_of(model: Sequence[DistributedDataParallel], run: Mapping[str, Any]) -> Any:
    """Megatron's optimizer of all chunks with a run's settings; gradients are finalised per token."""
    config = model[0].config
    optimizer = get_megatron_optimizer(optimizer_config(config, run), [*model])
    for chunk in model:
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.config.finalize_model_grads_func = finalize_model_grads
    return optimizer


def optimizer_config(config: TransformerConfig, run: Mapping[str, Any]) -> OptimizerConfig:
    """Megatron's config of the optimizer of a model with this config."""
    return OptimizerConfig(
        **{key: run[key] for key in OPTIMIZER if key in run},
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=config.params_dtype,
    )


def schedule_of(
    optimizer: Any, run: Mapping[str, Any], *, train_iters: int, sequence: int
) -> OptimizerParamScheduler:
    """The learning rate over the whole run, whatever segment of it this job trains; in samples.

    From a checkpoint it takes how far it is, and nothing that keys of the run say.

    ``sequence`` is the tokens of a sequence, for a warmup that is given in tokens.
    """
    samples = run["global_batch_size"]
    return OptimizerParamScheduler(
        optimizer,
        init_lr=run["lr_warmup_init"],
        max_lr=run["lr"],
        min_lr=min(run["min_lr"], run["lr"]),
        lr_warmup_steps=warmup_iters(run, train_iters, sequence) * samples,
        lr_decay_steps=(run["lr_decay_iters"] or train_iters) * samples,
        lr_decay_style=run["lr_decay_style"],
        start_wd=run["weight_decay"],
        end_wd=run["weight_decay"],
        wd_incr_steps=train_iters * samples,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
