"""The keys of a training run: Megatron's arguments by their names, and what Megatron has no word for.

Each class is one concern of a run; :class:`Run` has the keys of all of them, side by side.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from plait.config.base import Name, Share, Strict
from plait.config.disk import KEEP
from plait.config.schedule import Schedule, check_warmup, skipped
from plait.config.spread import refused

STAGES: dict[int, dict[str, Any]] = {
    1: {"freeze": ["language_model", "vision_model"], "lr": 1e-3, "global_batch_size": 256,
        "micro_batch_size": 16},
    2: {"freeze": ["vision_model"], "lr": 2e-5, "global_batch_size": 128, "micro_batch_size": 1},
}  # fmt: skip
"""What a LLaVA stage trains, and how, where a run's own keys do not say otherwise (LLaVA-JP)."""
STAGE_ALWAYS = {
    "min_lr": 1e-8, "weight_decay": 0.1, "adam_beta2": 0.999, "lr_warmup_fraction": 0.03, "clip_grad": 1.0,
}  # fmt: skip
DECAYS = ("cosine", "linear", "inverse-square-root")
"""Shapes of a learning rate that falls."""
READ_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_eps"), ("optimizer", ("adam",))),
    "sgd_momentum": ("optimizer", ("sgd",)),
    **dict.fromkeys(("fp8_amax_compute_algo", "fp8_amax_history_len"), ("fp8", ("hybrid", "e4m3"))),
    **dict.fromkeys(
        ("loss_scale", "initial_loss_scale", "loss_scale_window", "hysteresis"), ("params_dtype", ("fp16",))
    ),
    "optimizer_offload_fraction": ("optimizer_cpu_offload", (True,)),
    "moe_router_load_balancing_type": ("moe_aux_loss_coeff", ()),
    **dict.fromkeys(("min_lr", "lr_decay_iters"), ("lr_decay_style", DECAYS)),
    "load_optim": ("finetune", (False,)),
    **dict.fromkeys(("eval_iters", "eval_mixture"), ("eval_interval", ())),
    **dict.fromkeys(("wandb_entity", "wandb_exp_name", "wandb_tags"), ("wandb_project", ())),
}
"""Keys that are read only where another has one of these values; without values, where it has any."""
NEEDS_ENGINE: dict[str, Any] = {
    "fp8": None, "attention_backend": "auto", "tp_comm_overlap": False, "moe_grouped_gemm": False,
    "apply_rope_fusion": False, "cpu_offloading_num_layers": 0,
}  # fmt: skip
"""Keys that only Transformer Engine's layers read where they differ from this value."""
FUSED = (
    "apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
)  # fmt: skip
"""Keys by which several operations become one kernel of a GPU."""
FP8_TOKENS = 16
"""What the tokens of a rank are a multiple of, for a product of matrices in fp8."""
SCORED_TOKENS = 256
"""Of how many tokens side by side a CPU keeps the scores of attention; a kernel computes those of more."""
Part = Literal["language_model", "vision_model", "vision_projection"]
PARTS: tuple[Part, ...] = get_args(Part)
LENGTHS = ("epochs", "train_iters", "train_tokens")
WARMUPS = ("lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_tokens")


def _several(chunks: int | None) -> int | None:
    """One chunk is none."""
    return None if chunks == 1 else chunks


class Prompt(Strict):
    """What an export is asked for a sample of its answers."""

    prompt: str
    image: str | None = Field(None, description="a picture file, anywhere")
    max_new_tokens: PositiveInt = 32


class Parallel(Strict):
    """Over how many processes a run spreads, and how."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: Annotated[PositiveInt | None, AfterValidator(_several)] = Field(
        None,
        description="chunks of layers that each pipeline stage is cut into, so that it waits less for others "
        "(Megatron's interleaved schedule): the model's layers / stages / "
        "num_layers_per_virtual_pipeline_stage; null or 1: none",
    )
    context_parallel_size: PositiveInt = Field(1, description="processes that share each sequence")
    data_parallel_size: PositiveInt = Field(
        1, description="copies of the model, each with samples of its own"
    )
    expert_model_parallel_size: PositiveInt = Field(
        1,
        description="data (x context) parallel processes among which a layer's experts are dealt out; all "
        "else is in each of them",
    )
    sequence_parallel: bool = Field(
        False, description="tensor parallel processes share norms and dropouts by sequence"
    )
    tp_comm_overlap: bool = Field(
        False,
        description="tensor parallel ranks talk while they compute (sequence_parallel, Transformer Engine)",
    )
    use_distributed_optimizer: bool = Field(False, description="copies share the optimizer's state")
    overlap_grad_reduce: bool = Field(False, description="gradients are reduced while others are computed")
    overlap_param_gather: bool = Field(
        False, description="weights are gathered while others compute (distributed optimizer)"
    )


class Experts(Strict):
    """How a mixture of experts is trained; a model without experts has no use for these keys."""

    moe_aux_loss_coeff: PositiveFloat | None = Field(
        None,
        description="weight of the loss that balances the experts, e.g. 0.01; null: none, as transformers "
        "trains unless told otherwise",
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss"] = Field(
        "aux_loss", description="what is balanced: each micro-batch, or each sequence"
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = Field(
        "allgather", description="how tokens reach their experts; alltoall needs a GPU"
    )
    moe_grouped_gemm: bool = Field(
        False, description="the experts of a process as one product (Transformer Engine)"
    )


class Memory(Strict):
    """What is kept, computed again or moved away."""

    recompute_granularity: Literal["selective", "full"] | None = Field(
        None, description="what the backward pass computes again: attention, or whole layers; null: nothing"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="how layers are chosen (granularity full)"
    )
    recompute_num_layers: PositiveInt | None = Field(
        None, description="layers of a chunk (uniform), or of a stage (block)"
    )
    cpu_offloading_num_layers: NonNegativeInt = Field(
        0, description="layers whose activations wait in the host's memory (Transformer Engine)"
    )
    optimizer_cpu_offload: bool = Field(False, description="the optimizer works in the host's memory (GPU)")
    optimizer_offload_fraction: Share = Field(1.0, description="share of its state that does so")

    @model_validator(mode="after")
    def _memory_keys_fit(self) -> Self:
        full, chosen = (
            self.recompute_granularity == "full",
            (self.recompute_method, self.recompute_num_layers),
        )
        if full and None in chosen:
            raise ValueError(
                "`recompute_granularity: full` needs `recompute_method` and `recompute_num_layers`"
            )
        if not full and chosen != (None, None):
            raise ValueError(
                "`recompute_method` and `recompute_num_layers` need `recompute_granularity: full`"
            )
        return self


class Precision(Strict):
    """Number types and the kernels that compute with them."""

    transformer_impl: Literal["local", "transformer_engine"] = Field(
        "local",
        description="whose layers: Megatron Core's own, or Transformer Engine's, which need a GPU and its "
        "image; checkpoints are the same",
    )
    params_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16",
        description="type of weights; masters are fp32. A CPU with AMX trains in bf16 about twice as fast",
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None, description="format of matrix products (Transformer Engine)"
    )
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    fp8_amax_history_len: PositiveInt = 1
    loss_scale: PositiveFloat | None = Field(
        None, description="a constant scale of the loss (fp16); null: it adapts"
    )
    initial_loss_scale: PositiveFloat = Field(2.0**32, description="the scale that adapts begins here (fp16)")
    loss_scale_window: PositiveInt = Field(1000, description="good steps before it grows (fp16)")
    hysteresis: PositiveInt = Field(2, description="bad steps before it shrinks (fp16)")
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = Field(
        "auto",
        description="Transformer Engine's attention: flash and fused are told where documents begin, unfused "
        "has a mask of every token; auto: the fastest of the first two, in fp32 the last",
    )
    apply_rope_fusion: bool = Field(
        False, description="rotary positions as one kernel (Transformer Engine, micro_batch_size 1)"
    )
    bias_activation_fusion: bool = Field(False, description="gate and activation as one kernel (GPU)")
    bias_dropout_fusion: bool = Field(False, description="dropout and residual sum as one kernel (GPU)")
    cross_entropy_loss_fusion: bool = Field(
        False, description="the loss as one kernel (GPU, not in deterministic_mode)"
    )
    gradient_accumulation_fusion: bool = Field(
        False, description="products that compute gradients add them up too (GPU, Apex)"
    )
    deterministic_mode: bool = Field(
        True, description="equal runs give equal bits; on GPUs by NCCL's and cuBLAS's settings too"
    )
    hidden_dropout: Share = 0.0
    attention_dropout: Share = 0.0

    @model_validator(mode="after")
    def _a_constant_scale_does_not_adapt(self) -> Self:
        adapts = ("initial_loss_scale", "loss_scale_window", "hysteresis")
        unread = [key for key in adapts if getattr(self, key) != Precision.model_fields[key].default]
        if self.loss_scale is not None and unread:
            raise ValueError(f"`{unread[0]}` is read only without `loss_scale`, whose scale does not adapt")
        return self


class Optimization(Strict):
    """The optimizer and its learning rate."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: PositiveFloat = 1e-5
    min_lr: NonNegativeFloat = 1e-6
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root"] = "cosine"
    lr_decay_iters: PositiveInt | None = Field(None, description="null: the run's length")
    lr_warmup_iters: NonNegativeInt = 0
    lr_warmup_fraction: Share | None = Field(None, description="warmup as a share of the run, instead")
    lr_warmup_tokens: PositiveInt | None = Field(None, description="warmup in tokens, instead")
    lr_warmup_init: NonNegativeFloat = Field(0.0, description="learning rate at the start of the warmup")
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.95
    adam_eps: PositiveFloat = 1e-8
    sgd_momentum: Share = 0.9
    clip_grad: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        given = [key for key in WARMUPS if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"a run has one warmup, not {' and '.join(given)}")
        if self.lr_warmup_init and not given:
            raise ValueError(f"`lr_warmup_init` is read only with a warmup: {', '.join(WARMUPS)}")
        return self

    @model_validator(mode="after")
    def _lr_is_the_highest(self) -> Self:
        for key in ("lr_warmup_init", *(("min_lr",) if self.lr_decay_style in DECAYS else ())):
            if getattr(self, key) > self.lr:
                raise ValueError(f"`{key}` {getattr(self, key)} is above `lr` {self.lr}")
        return self


class Length(Strict):
    """How long a run is, what it leaves out and what it keeps."""

    micro_batch_size: PositiveInt = Field(1, description="sequences a rank sees in one forward pass")
    global_batch_size: PositiveInt = Field(8, description="sequences of one optimizer step, all ranks")
    epochs: PositiveInt | None = Field(None, description="passes over the mixture; gives train_iters")
    train_iters: PositiveInt | None = Field(None, description="optimizer steps, if not by epochs")
    train_tokens: PositiveInt | None = Field(
        None, description="tokens of all sequences, padding too, instead"
    )
    save_interval: PositiveInt | None = Field(None, description="iterations between two checkpoints")
    save_every: Literal["epoch"] | None = Field(None, description="a checkpoint at the end of each epoch")
    skip_train_iteration_range: tuple[str, ...] = Field(
        (), description="iterations first-last whose samples are left out; the schedule goes on over them"
    )
    seed: NonNegativeInt = 1234

    @model_validator(mode="after")
    def _lengths_are_given_once(self) -> Self:
        if sum(getattr(self, key) is not None for key in LENGTHS) != 1:
            raise ValueError("a run has either `epochs` or `train_iters`, or `train_tokens`")
        if (self.save_interval is None) == (self.save_every is None):
            raise ValueError("a run has either `save_interval` or `save_every: epoch`")
        if self.save_every and self.epochs is None:
            raise ValueError("`save_every: epoch` needs `epochs`")
        skipped(self.skip_train_iteration_range)
        return self


class Reading(Strict):
    """How a run reads its mixture."""

    loss_roles: tuple[Literal["system", "user", "assistant"], ...] = Field(
        ("assistant",), description="whose tokens are trained"
    )
    num_workers: NonNegativeInt = Field(
        0, description="energon's loader processes a stream; it decides the order"
    )
    data_streams: PositiveInt | None = Field(
        None,
        description="streams into which energon deals the samples: micro-batches come from them in turn, so "
        "that the order depends on their number and not on data_parallel_size. Copies whose number does not "
        "divide it read some of them together. null: as many as copies; of a run that goes on, as many as "
        "before",
    )
    shuffle_buffer_size: PositiveInt | None = Field(100, description="samples energon shuffles among")
    max_samples_per_sequence: PositiveInt | None = Field(100, description="samples energon reads in a row")


class Logging(Strict):
    """What a run tells while it trains; none of it changes what is trained."""

    log_interval: PositiveInt = Field(
        10, description="iterations between two lines, where there is no terminal"
    )
    spike_threshold: PositiveFloat | None = Field(
        None,
        description="an iteration is logged and marked in the curve where its lm loss exceeds the median of "
        "the ten before it by more than so many times that median, 2 in LLaVA-JP; null: none is",
    )
    peak_tflops: PositiveFloat | None = Field(
        None, description="what a device can do at most, for MFU; null: a matrix product is measured"
    )
    wandb_project: str | None = Field(
        None, min_length=1, description="Weights & Biases: the project; null: it is not told"
    )
    wandb_entity: str | None = Field(None, description="Weights & Biases: the user or team")
    wandb_exp_name: str | None = Field(None, description="Weights & Biases: the name; null: the run's")
    wandb_tags: tuple[str, ...] = Field((), description="Weights & Biases: tags")


class Launch(Strict):
    """How a run is started and kept safe; none of it changes what is trained."""

    launch: Literal["auto", "local", "slurm", "env"] = Field(
        "auto",
        description="who starts the processes: torchrun here, `srun` on the nodes of the Slurm job, or "
        "whoever sets WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT; auto: slurm where the job has several "
        "nodes, else local",
    )
    debug: bool = Field(
        False,
        description="train a few iterations of one sequence each, in one process under Python's debugger, in "
        "this terminal; nothing is kept, so the checkpoint that was asked for is not made",
    )
    nodes: PositiveInt = Field(1, description="machines that share the run's processes evenly (slurm)")
    gpu_ids: tuple[NonNegativeInt, ...] = Field(
        (), description="GPUs of a machine that are used, by number; none named: as the environment says"
    )
    network_interface: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_,-]*$",
        description="what machines talk over, e.g. ib0, eth0 (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)",
    )
    verify_data: Literal["sampled", "all", "none"] = Field(
        "sampled",
        description="files of the mixture that are compared with their manifests before a job starts: the "
        "bytes of all; sampled: the sizes of all, and 256 MiB of some, others for each checkpoint",
    )
    distributed_timeout_minutes: PositiveInt = Field(
        30, description="how long a process waits for the others of its run before it gives up"
    )
    requeue_before: PositiveInt = Field(
        120, description="seconds before the end of a Slurm job at which it saves and is queued again"
    )
    saves_per_job: PositiveInt = Field(
        1,
        description="checkpoints that one job writes, as far as they are asked for; it starts once for them",
    )
    save_optim: Literal["all", "last", "none"] = Field(
        "all",
        description="which checkpoints keep their optimizer: with `last` a job removes it of those before "
        "the one that it starts from; with `none` the run's final one has none either",
    )
    keep: str = Field(
        "all",
        pattern=f"^({KEEP.pattern})$",
        description="which checkpoints keep their weights, of those before the one that a job starts from: "
        "all, the `last N`, or `every K` iterations; what is to be exported, or begins another run, stays",
    )
    non_persistent_save_interval: PositiveInt | None = Field(
        None, description="iterations between two states against a crash, removed after the next checkpoint"
    )
    async_save: bool = Field(
        True,
        description="whether training goes on while a checkpoint or a state is written: each rank then "
        "keeps a copy of what it saves in the machine's memory; false: training waits",
    )


class Evaluation(Strict):
    """What a run is measured by while it trains; none of it changes what is trained."""

    eval_interval: PositiveInt | None = Field(
        None, description="iterations between two evaluations; the run's last is one too; null: none"
    )
    eval_iters: PositiveInt = Field(
        10, description="batches of an evaluation, global_batch_size each: the same every time"
    )
    eval_mixture: Name | None = Field(
        None,
        description="the mixture that is evaluated, of the same format and length; null: the val splits of "
        "the run's own, which packed mixtures do not have. After a change of it a dry run lists checkpoints "
        "that stand; none is trained again",
    )


class Around(Logging, Launch, Evaluation):
    """The keys of a run that change nothing of what is trained."""


class Asked(Strict):
    """What a plan asks of a job besides its checkpoint: it depends on what else is asked for."""

    until: NonNegativeInt = Field(
        description="the last iteration that it saves; those after its own wait for their jobs"
    )
    wanted: tuple[PositiveInt, ...] = Field((), description="iterations whose weights stay")
    resumed: tuple[PositiveInt, ...] = Field((), description="iterations that another run goes on from")


class Beside(Around):
    """What the workflow tells a training job besides the run's settings."""

    asked: Asked | None = None


class Run(Parallel, Experts, Memory, Precision, Optimization, Length, Reading, Around):
    """One training run; keys without a meaning here are Megatron's arguments of that name."""

    recipe: Literal["chat", "solo", "llava", "llava_jp"] = Field(
        description="what kind of model is trained on what"
    )
    model: Name = Field(description="a model of `models`, or of `raw_hf`")
    mixture: Name = Field(description="a mixture of this config")
    stage: Literal[1, 2] | None = Field(
        None, description="LLaVA's stage: 1 trains the projector, 2 also the language model; sets defaults"
    )
    freeze: tuple[Part, ...] = Field((), description="parts that are not trained (LLaVA)")
    start_run: Name | None = Field(
        None,
        description="a run whose weights this one starts from; its mixture may be another, so that a "
        "curriculum is one run a mixture",
    )
    start_iteration: PositiveInt | None = Field(None, description="the iteration of `start_run`")
    finetune: bool = Field(
        True,
        description="false: go on where `start_run` stopped, with its optimizer and data, on any grid",
    )
    load_optim: bool = Field(
        True,
        description="false: go on without its optimizer, which begins anew; weights, schedule and data go on",
    )
    init: Literal["checkpoint", "random"] = Field(
        "checkpoint", description="random: the model's shape with weights drawn anew"
    )
    init_method_std: PositiveFloat = Field(0.02, description="standard deviation of `init: random`")
    generate: tuple[Prompt, ...] = Field((), description="what each of `exports` is asked")
    exports: tuple[PositiveInt, ...] = Field((), description="iterations that the default target exports")

    @model_validator(mode="before")
    @classmethod
    def _stage_sets_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("stage") not in STAGES:
            return values
        defaults = STAGES[values["stage"]] | STAGE_ALWAYS
        if values.get("optimizer", "adam") != "adam":
            defaults = {key: value for key, value in defaults.items() if not key.startswith("adam_")}
        if values.get("lr_decay_style", "cosine") not in DECAYS:
            defaults.pop("min_lr", None)
        if set(WARMUPS) & values.keys():
            defaults = {key: value for key, value in defaults.items() if key not in WARMUPS}
        return {**defaults, **values}

    @model_validator(mode="after")
    def _every_key_is_read(self) -> Self:
        for key, (other, values) in READ_WITH.items():
            found = getattr(self, other)
            is_read = found in values if values else found is not None
            if getattr(self, key) != Run.model_fields[key].default and not is_read:
                wanted = f"{other}: {' or '.join(map(str, values))}" if values else other
                raise ValueError(f"`{key}` is read only with `{wanted}`")
        if len(set(self.freeze)) == len(PARTS):
            raise ValueError(f"`freeze` names {', '.join(self.freeze)}: nothing is left to train")
        return self

    @model_validator(mode="after")
    def _a_start_is_whole(self) -> Self:
        if (self.start_run is None) != (self.start_iteration is None):
            raise ValueError("`start_run` and `start_iteration` go together")
        if not self.finetune and not self.start_run:
            raise ValueError("`finetune: false` needs `start_run`: there is nothing else to go on from")
        if self.start_run and self.init == "random":
            raise ValueError("a run starts from `start_run` or with `init: random`, not both")
        return self

    @model_validator(mode="after")
    def _batches_are_whole(self) -> Self:
        stride = self.micro_batch_size * self.data_parallel_size
        if self.global_batch_size % stride:
            copies = f" x data_parallel_size {self.data_parallel_size}" if self.data_parallel_size > 1 else ""
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}{copies}"
            )
        return self

    @model_validator(mode="after")
    def _sequences_are_balanced_alone(self) -> Self:
        if self.moe_router_load_balancing_type == "seq_aux_loss" and self.micro_batch_size > 1:
            raise ValueError(
                f"`moe_router_load_balancing_type: seq_aux_loss` needs micro_batch_size 1, not "
                f"{self.micro_batch_size}: Megatron Core weighs that loss by the tokens of one sequence"
            )
        return self

    @model_validator(mode="after")
    def _it_can_be_spread(self) -> Self:
        why = refused(self.model_dump())
        if why:
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.train_iters and not self.lr_warmup_tokens:
            check_warmup(self.model_dump(), self.train_iters, 0)
        return self

    @model_validator(mode="after")
    def _exports_are_saved(self) -> Self:
        schedule = Schedule.of(self.model_dump(), None)
        for step in self.exports:
            if schedule and not schedule.saves(step):
                raise ValueError(f"exports names iteration {step}, but {schedule.describe(step)}")
        return self

    @model_validator(mode="after")
    def _nodes_share_evenly(self) -> Self:
        if self.launch == "local" and self.nodes > 1:
            raise ValueError(
                f"`launch: local` starts every process on this machine, and `nodes` is {self.nodes}"
            )
        processes = processes_per_node(self.model_dump(), self.nodes)
        if self.gpu_ids and len(self.gpu_ids) < processes:
            raise ValueError(
                f"`gpu_ids` names {len(self.gpu_ids)} GPUs, the run has {processes} processes on a machine "
                f"({factors(self.model_dump())}, over nodes {self.nodes})"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return world_size(self.model_dump())


AXES = tuple(f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context", "data"))


def world_size(run: Mapping[str, Any]) -> int:
    """Processes of a run: tensor x pipeline x context x data."""
    return math.prod(int(run[axis]) for axis in AXES)


def factors(run: Mapping[str, Any]) -> str:
    """What the number of a run's processes is the product of."""
    return " x ".join(f"{axis} {run[axis]}" for axis in AXES)


OF_EXPERTS = ("expert_model_parallel_size", *Experts.model_fields)
"""Keys that only a mixture of experts reads."""


def unfit_for_experts(run: Mapping[str, Any], experts: int) -> str:
    """What of a run does not fit a model of so many experts, in a sentence; 0 is a dense model."""
    tensor, parallel = run["tensor_model_parallel_size"], run["expert_model_parallel_size"]
    unread = next((key for key in OF_EXPERTS if run[key] != Run.model_fields[key].default), None)
    if not experts:
        return (
            f"{unread} {run[unread]!r} needs a mixture of experts, and its model is dense" if unread else ""
        )
    if run["recipe"] != "chat":
        return (
            f"recipe {run['recipe']!r} trains no mixture of experts, and its model has {experts}; chat does"
        )
    chunks = run["virtual_pipeline_model_parallel_size"]
    if chunks:
        return (
            f"virtual_pipeline_model_parallel_size {chunks} and a mixture of experts: no run has shown yet "
            "that they train the same"
        )
    if experts % parallel:
        legal = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        return (
            f"expert_model_parallel_size {parallel} does not divide the {experts} experts of a layer; it may "
            f"be {legal}"
        )
    if tensor > 1 and not run["sequence_parallel"]:
        return (
            f"experts over tensor_model_parallel_size {tensor} need `sequence_parallel`: Megatron trains "
            "them in no other way"
        )
    return ""


def needs_engine(run: Mapping[str, Any]) -> str:
    """Which key of a run its layers would not read, in a sentence; "" if there is none."""
    if run["transformer_impl"] == "transformer_engine":
        return ""
    for key, without in NEEDS_ENGINE.items():
        if run[key] != without:
            return (
                f"{key} {run[key]!r} would be read by Transformer Engine's layers, and transformer_impl is "
                f"{run['transformer_impl']!r}"
            )
    return ""


def without_engine(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's keys as Megatron Core's own layers read them."""
    return {**run, **NEEDS_ENGINE, "transformer_impl": "local"}


def attends_by_documents(run: Mapping[str, Any]) -> bool:
    """Whether attention is told where documents begin, in place of a mask of every token.

    Transformer Engine's flash and fused attention take no mask of tokens: beside "causal" they would ignore
    it, and a document would see those before it. Its unfused attention takes one, and alone computes in fp32.
    """
    return bool(
        run.get("transformer_impl") == "transformer_engine"
        and run["attention_backend"] != "unfused"
        and run["params_dtype"] != "fp32"
    )


def pieces_of_sequence(run: Mapping[str, Any]) -> int:
    """What a sequence's length is a multiple of: ranks share it, and fp8 counts in sixteens."""
    tensor = run["tensor_model_parallel_size"] if run["sequence_parallel"] else 1
    context = run["context_parallel_size"]
    return int(tensor * (2 * context if context > 1 else 1) * (FP8_TOKENS if run["fp8"] else 1))


def processes_per_node(run: Mapping[str, Any], nodes: int) -> int:
    """Processes of a run on each of its nodes.

    Raises:
        ValueError: they do not share them evenly; it has the factors.
    """
    world = world_size(run)
    if world % nodes:
        legal = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"`nodes` {nodes} do not share the run's {world} processes ({factors(run)}) evenly; "
            f"nodes may be {legal}"
        )
    return world // nodes
