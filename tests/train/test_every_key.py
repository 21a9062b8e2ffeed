"""What each key of a run changes: a row for every key, shown by what is really built from it."""

import json
import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from jobs import SPLIT, packed, pictured
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from test_wandb import told
from torch.testing._internal.distributed.fake_pg import FakeStore

from plait import files, layout
from plait.config import Plan
from plait.config.asking import Asking
from plait.config.disk import Thinning
from plait.config.model import load
from plait.config.run import Around, Run, world_size
from plait.config.schedule import Schedule
from plait.errors import ConfigError, DataError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train import build, compat, intact, launch, node, rank
from plait.train.hardware import check_hardware
from plait.train.job import Job
from plait.train.kept import Kept
from plait.train.loop import Trainer
from plait.train.metrics import Metrics
from plait.train.world import world

BASE = yaml.safe_load((Path(__file__).parents[2] / "config/config.yaml").read_text())
HELD = {
    "datasets": {"held": BASE["datasets"]["dialogues"]},
    "mixtures": {"held": BASE["mixtures"]["talk"] | {"datasets": ["held"]}},
}
"""What a run can be evaluated on."""
BEFORE = {
    "recipe": "chat", "model": "chat-tiny", "mixture": "talk", "train_iters": 24, "save_interval": 8,
    "micro_batch_size": 2, "global_batch_size": 12, "lr": 1e-2, "params_dtype": "fp32",
}  # fmt: skip
LLAVA = {
    "recipe": "llava", "model": "llava-tiny", "mixture": "english", "shuffle_buffer_size": 8,
    "max_samples_per_sequence": 4,
}  # fmt: skip
SPEC = Spec.from_config(
    {
        "architectures": ["MistralForCausalLM"], "vocab_size": 300, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run with some keys, and folders of data that it could train on."""

    keys: dict[str, Any]
    folders: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def run(self):
        return Run(**BEFORE | self.keys)

    @cached_property
    def settings(self):
        return self.run.model_dump(mode="json", exclude={"exports", "generate", *Around.model_fields}) | SPLIT

    @cached_property
    def around(self):
        return self.run.model_dump(mode="json", include=set(Around.model_fields))

    @cached_property
    def plan(self):
        """The default plan with this run in it, and with one before it."""
        sections = {key: BASE[key] | HELD.get(key, {}) for key in ("datasets", "mixtures")}
        return Plan(load(BASE | sections | {"runs": {"before": BEFORE, "r": BEFORE | self.keys}}))

    @cached_property
    def place(self):
        return self.folders["pictured" if self.run.recipe == "llava" else "packed"]

    @cached_property
    def job(self):
        start, target = self.place.start, "data/ckpts/r/iter_0000008"
        return Job(start, "data/analysis/x", "data/ckpts/r/schedule.json", target, self.settings, self.around)

    @cached_property
    def grid(self):
        return Grid(self.run.tensor_model_parallel_size, self.run.pipeline_model_parallel_size)

    @cached_property
    def transformer(self):
        dtype = build.DTYPES[self.run.params_dtype]
        return build.transformer_config(SPEC, self.grid, dtype=dtype, run=self.settings)

    @cached_property
    def schedule(self):
        groups = SimpleNamespace(param_groups=[{}])
        return build.schedule_of(groups, self.settings, train_iters=24, sequence=64)

    @contextmanager
    def model(self):
        """This run's chunks on the first rank of a world of its size, whose other ranks are not there."""
        compat.install()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.run.world_size)
        try:
            parallel_state.initialize_model_parallel(
                self.grid.tp, self.grid.pp, create_gloo_process_groups=False
            )
            model_parallel_cuda_manual_seed(0)
            spec = Spec.of(self.job.start, layout.HF_CONFIG)
            yield build.build_chunks(spec, self.grid, dtype=torch.float32, run=self.settings), spec
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def trainer(self, iteration=0):
        model = SimpleNamespace(config=self.transformer)
        state = SimpleNamespace(iteration=iteration)
        return Trainer([model], state, None, self.settings, self.around, length=24)


# How an effect is shown: what a run has, does or asks for, where the key decides


def transformer(name):
    return lambda case: getattr(case.transformer, name)


def ddp(name):
    return lambda case: getattr(build.ddp_config(case.settings), name)


def optimizer(name):
    return lambda case: getattr(build.optimizer_config(case.transformer, case.settings), name)


def scheduler(name):
    return lambda case: getattr(case.schedule, name)


def samples_of(name):
    """A share of what the schedule counts in samples."""
    return lambda case: getattr(case.schedule, name) / case.run.global_batch_size


def learning_rates(case):
    """The learning rate of each iteration."""
    found = []
    for _ in range(24):
        found.append(case.schedule.optimizer.param_groups[0]["lr"])
        case.schedule.step(case.run.global_batch_size)
    return found


def environment(name):
    return lambda case: node.environment(case.job, 1).get(name)


def command(case):
    return launch.command(case.job)[:-1]


def processes(case):
    return world_size(case.settings)


def saved(case):
    """What the run saves, over a hundred packed sequences."""
    return Schedule.of(case.run.model_dump(), 100, sequence=64).steps()


def feed(case, *, evaluates=False):
    spec = Spec.of(case.job.start, layout.HF_CONFIG)
    copies = case.run.data_parallel_size
    return rank._packed(case.job, spec, evaluates=evaluates, dp_rank=0, dp_size=copies)


def samples(case):
    """Token ids of the first iteration on rank 0, by micro-batch."""
    return [batch.input_ids.tolist() for batch in feed(case).batches(0)]


def trained_tokens(case):
    return [batch.loss_mask.sum().item() for batch in feed(case).batches(0)]


def evaluated_draws(case):
    return feed(case, evaluates=True).order.draws / case.run.global_batch_size


@contextmanager
def energon_feed(case):
    with case.model() as (_, spec):
        yield rank._energon(
            case.job, spec, evaluates=False, dp_rank=0, dp_size=1, streams=case.job.streams(None)
        )


def energon_samples(case):
    """Token ids of the first two iterations, as energon gives them."""
    with energon_feed(case) as found:
        return [batch.input_ids.tolist() for step in range(2) for batch in found.batches(step)]


def energon_workers(case):
    with energon_feed(case) as found:
        return found.loaders[0].worker_config.num_workers


def start(case):
    return str(case.plan.start(layout.Iteration(run="r", iteration=16), None))


def first(case):
    """The iterations that the first job trains."""
    start, target = "data/ckpts/before/iter_0000008", "data/ckpts/r/iter_0000016"
    return Job(start, "", "", target, case.settings, case.around).steps


def first_weights(case):
    """The standard deviation of a matrix with which the run begins."""
    with case.model() as (chunks, spec):
        rank._load_start(chunks, case.job, spec)
        return chunks[0].decoder.layers[0].mlp.linear_fc1.weight.std().item()


def frozen(case):
    """Parts of a LLaVA without anything to train."""
    with case.model() as (chunks, _):
        build.freeze(chunks, case.settings["freeze"])
        parts = dict(chunks[0].named_children())
    return {n for n, part in parts.items() if not any(p.requires_grad for p in part.parameters())}


def until(case):
    """The last iteration that the first job saves where all are asked for."""
    asking = Asking(case.plan)
    saves = [layout.Iteration(run="r", iteration=step) for step in saved(case)]
    for one in saves:
        asking.add(one)
    return asking.until(saves[0])


def thinned(question):
    """The checkpoints of which something stays, of those of the whole run."""
    return lambda case: getattr(Thinning.of(case.around, 24), question)(saved(case))


def spikes(case):
    """The iterations whose losses are told as jumps: one of ten times the others, one of thrice."""
    folder = case.folders["tmp"] / f"spikes{case.around['spike_threshold']}"
    losses = dict.fromkeys(range(1, 12), 1.0) | {7: 10.0, 9: 3.0}
    with Metrics(folder, start=0, stop=11, logged=case.around) as metrics:
        for n, loss in losses.items():
            metrics.write({"iteration": n, "lm loss": loss})
    events = (folder / layout.EVENTS).read_text() if (folder / layout.EVENTS).exists() else ""
    return [json.loads(line)["iteration"] for line in events.splitlines()]


def at(question):
    """The iterations at which the trainer does something."""
    return lambda case: [n for n in range(1, 25) if getattr(case.trainer(n), question)()]


def writes_beside(case):
    """Whether training goes on while a save is written."""
    return rank._saves(case.job, Kept(case.job), lambda: None)._beside is not None


def evaluations(case):
    return at("_is_evaluated")(case) if case.around["eval_interval"] else []


def lines(case):
    """Iterations that are told in the log."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.args[0])
    logger = logging.getLogger("plait.train.metrics")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with Metrics(case.folders["tmp"] / "lines", start=0, stop=24, logged=case.around) as metrics:
        metrics.lines = True
        for n in range(1, 25):
            metrics.write({"iteration": n})
    logger.removeHandler(handler)
    return heard


def peak(case):
    compat.install()
    return case.trainer().peak / 1e12


def wandb(name):
    """What the log of Weights & Biases, in its offline mode, has of the run."""

    def of(case):
        folder = case.folders["tmp"] / re.sub(r"\W", "", str(case.keys))
        if not folder.exists():
            with Metrics(folder, start=0, stop=24, logged=case.around) as metrics:
                metrics.write({"iteration": 1})
        runs, _ = told(folder)
        found = getattr(runs[0], name) if runs else None
        return found if isinstance(found, str | None) else tuple(found)

    return of


def fused_angles(case):
    """Megatron's config asks whether the kernel is there, which Transformer Engine has."""
    with mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", object()):
        return case.transformer.apply_rope_fusion


def timeout(case):
    """Minutes that a process group waits."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    store = case.folders["tmp"] / f"store{case.around['distributed_timeout_minutes']}"
    minutes = case.around["distributed_timeout_minutes"]
    with world(tp=1, pp=1, seed=0, rendezvous=f"file://{store}", minutes=minutes):
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        return backend.options._timeout.total_seconds() / 60


def damage(case):
    """Whether a flipped bit is found in data of which a sample is empty."""
    shard, analysis = (
        case.folders["tmp"] / case.around["verify_data"] / name for name in ("shard", "mixture")
    )
    shard.mkdir(parents=True)
    (shard / "data-text.bin").write_bytes(b"ab")
    files.write_manifest(shard, kind="indexed", settings={})
    analysis.mkdir()
    files.write_manifest(analysis, kind="analysis", settings={}, inputs=[shard])
    (shard / "data-text.bin").write_bytes(b"ac")
    try:
        with mock.patch.object(intact, "SAMPLED", 0):
            intact.check_bytes(analysis, case.around["verify_data"], seed="a")
    except DataError:
        return "found"
    return "missed"


def clock(case):
    return launch.Clock.of(case.job).before


# The table


@dataclass(frozen=True)
class Row:
    """How a key's effect is shown.

    Attributes:
        value: a value that is not its default.
        shown: what differs.
        equals: what it is then, where that is one value; the key's own where it is left out.
        beside: other keys of both runs, the one with it and the one without.
        instead: keys of the one without.
        refused: what is said where there is no GPU.
    """

    value: Any
    shown: Any
    equals: Any = None
    beside: dict[str, Any] = field(default_factory=dict)
    instead: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


GPU = "needs a GPU"
DIFFERS = object()
"""What is shown is no single value: it differs."""
ENGINE = {"transformer_impl": "transformer_engine"}
FP8, FP16 = ENGINE | {"fp8": "hybrid"}, {"params_dtype": "fp16"}
FULL = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SHARED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
EVALUATED = {"eval_interval": 6, "eval_mixture": "held"}
AGAIN = {"start_run": "before", "start_iteration": 8}
TOLD = {"wandb_project": "p"}

ROWS = {
    # Parallel
    "tensor_model_parallel_size": Row(2, transformer("tensor_model_parallel_size")),
    "pipeline_model_parallel_size": Row(2, transformer("pipeline_model_parallel_size")),
    "virtual_pipeline_model_parallel_size": Row(
        2, transformer("virtual_pipeline_model_parallel_size"), beside={"pipeline_model_parallel_size": 2}
    ),
    "context_parallel_size": Row(2, transformer("context_parallel_size")),
    "expert_model_parallel_size": Row(
        2, lambda case: rank.axes(case.job)["ep"], beside={"data_parallel_size": 2}
    ),
    "data_parallel_size": Row(2, processes),
    "sequence_parallel": Row(
        True, transformer("sequence_parallel"), beside={"tensor_model_parallel_size": 2}
    ),
    "tp_comm_overlap": Row(
        True, transformer("tp_comm_overlap"), refused=GPU,
        beside=ENGINE | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "use_distributed_optimizer": Row(True, ddp("use_distributed_optimizer")),
    "overlap_grad_reduce": Row(True, ddp("overlap_grad_reduce")),
    "overlap_param_gather": Row(True, ddp("overlap_param_gather"), beside=SHARED),
    # Experts
    "moe_aux_loss_coeff": Row(0.01, transformer("moe_aux_loss_coeff")),
    "moe_router_load_balancing_type": Row(
        "seq_aux_loss", transformer("moe_router_load_balancing_type"),
        beside={"moe_aux_loss_coeff": 0.01, "micro_batch_size": 1},
    ),
    "moe_token_dispatcher_type": Row("alltoall", transformer("moe_token_dispatcher_type"), refused=GPU),
    "moe_grouped_gemm": Row(True, transformer("moe_grouped_gemm"), beside=ENGINE, refused=GPU),
    # Memory
    "recompute_granularity": Row("selective", transformer("recompute_granularity")),
    "recompute_method": Row("uniform", transformer("recompute_method"), beside=FULL),
    "recompute_num_layers": Row(2, transformer("recompute_num_layers"), beside=FULL),
    "cpu_offloading_num_layers": Row(
        2, transformer("cpu_offloading_num_layers"), beside=ENGINE, refused=GPU
    ),
    "optimizer_cpu_offload": Row(True, optimizer("optimizer_cpu_offload"), refused=GPU),
    "optimizer_offload_fraction": Row(
        0.5, optimizer("optimizer_offload_fraction"), beside={"optimizer_cpu_offload": True}, refused=GPU
    ),
    # Precision
    "params_dtype": Row(
        "bf16", transformer("params_dtype"), torch.bfloat16, instead={"params_dtype": "fp32"}
    ),
    "fp8": Row("hybrid", transformer("fp8"), beside=ENGINE, refused=GPU),
    "fp8_amax_compute_algo": Row("max", transformer("fp8_amax_compute_algo"), beside=FP8, refused=GPU),
    "fp8_amax_history_len": Row(8, transformer("fp8_amax_history_len"), beside=FP8, refused=GPU),
    "loss_scale": Row(64.0, optimizer("loss_scale"), beside=FP16, refused=GPU),
    "initial_loss_scale": Row(
        2.0, optimizer("initial_loss_scale"), beside=FP16, refused=GPU
    ),
    "loss_scale_window": Row(7.0, optimizer("loss_scale_window"), beside=FP16, refused=GPU),
    "hysteresis": Row(3, optimizer("hysteresis"), beside=FP16, refused=GPU),
    "attention_backend": Row(
        "flash", transformer("attention_backend"), AttnBackend.flash,
        beside=ENGINE | {"params_dtype": "bf16"}, refused=GPU,
    ),
    "apply_rope_fusion": Row(True, fused_angles, beside=ENGINE | {"micro_batch_size": 1}, refused=GPU),
    "bias_activation_fusion": Row(True, transformer("bias_activation_fusion"), refused=GPU),
    "bias_dropout_fusion": Row(True, transformer("bias_dropout_fusion"), refused=GPU),
    "cross_entropy_loss_fusion": Row(
        True, transformer("cross_entropy_loss_fusion"), beside={"deterministic_mode": False}, refused=GPU
    ),
    "gradient_accumulation_fusion": Row(True, transformer("gradient_accumulation_fusion"), refused=GPU),
    "transformer_impl": Row("transformer_engine", transformer("transformer_impl"), refused=GPU),
    "deterministic_mode": Row(False, transformer("deterministic_mode")),
    "hidden_dropout": Row(0.1, transformer("hidden_dropout")),
    "attention_dropout": Row(0.1, transformer("attention_dropout")),
    # Optimization
    "optimizer": Row("sgd", optimizer("optimizer")),
    "lr": Row(0.3, scheduler("max_lr")),
    "min_lr": Row(1e-3, scheduler("min_lr")),
    "lr_decay_style": Row("linear", learning_rates, DIFFERS),
    "lr_decay_iters": Row(12, samples_of("lr_decay_steps")),
    "lr_warmup_iters": Row(3, samples_of("lr_warmup_steps")),
    "lr_warmup_fraction": Row(0.25, samples_of("lr_warmup_steps"), 6),
    "lr_warmup_tokens": Row(2 * 12 * 64, samples_of("lr_warmup_steps"), 2),
    "lr_warmup_init": Row(1e-4, scheduler("init_lr"), beside={"lr_warmup_iters": 2}),
    "weight_decay": Row(0.2, scheduler("end_wd")),
    "adam_beta1": Row(0.8, optimizer("adam_beta1")),
    "adam_beta2": Row(0.9, optimizer("adam_beta2")),
    "adam_eps": Row(1e-6, optimizer("adam_eps")),
    "sgd_momentum": Row(0.5, optimizer("sgd_momentum"), beside={"optimizer": "sgd"}),
    "clip_grad": Row(0.5, optimizer("clip_grad")),
    # Length
    "micro_batch_size": Row(3, samples, DIFFERS),
    "global_batch_size": Row(24, samples, DIFFERS),
    "epochs": Row(1, saved, DIFFERS, instead={"epochs": 2}, beside={"train_iters": None}),
    "train_iters": Row(30, saved, [8, 16, 24, 30]),
    "train_tokens": Row(10 * 12 * 64, saved, [8, 10], beside={"train_iters": None}, instead={"epochs": 1}),
    "save_interval": Row(12, saved, [12, 24]),
    "save_every": Row(
        "epoch", saved, [9, 18], beside={"train_iters": None, "epochs": 2, "save_interval": None},
        instead={"save_interval": 8},
    ),
    "skip_train_iteration_range": Row(
        ["3-5"], lambda case: case.trainer().skipped, (range(3, 6),)
    ),
    "seed": Row(7, samples, DIFFERS),
    # Reading
    "loss_roles": Row(["user"], trained_tokens, DIFFERS),
    "num_workers": Row(2, energon_workers, beside=LLAVA),
    "data_streams": Row(3, energon_samples, DIFFERS, beside=LLAVA),
    "shuffle_buffer_size": Row(3, energon_samples, DIFFERS, beside=LLAVA),
    "max_samples_per_sequence": Row(2, energon_samples, DIFFERS, beside=LLAVA),
    # Logging
    "log_interval": Row(12, lines, [12, 24]),
    "spike_threshold": Row(4.0, spikes, [7]),
    "peak_tflops": Row(3.0, peak),
    "wandb_project": Row("p", wandb("project")),
    "wandb_entity": Row("lab", wandb("entity"), beside=TOLD),
    "wandb_exp_name": Row("mine", wandb("display_name"), beside=TOLD),
    "wandb_tags": Row(("a", "b"), wandb("tags"), beside=TOLD),
    # Launch
    "launch": Row("slurm", command, DIFFERS),
    "debug": Row(True, command, DIFFERS),
    "nodes": Row(2, command, DIFFERS, beside={"launch": "slurm", "data_parallel_size": 2}),
    "gpu_ids": Row([3], environment("CUDA_VISIBLE_DEVICES"), "3"),
    "network_interface": Row("ib0", environment("GLOO_SOCKET_IFNAME")),
    "verify_data": Row("all", damage, "found"),
    "distributed_timeout_minutes": Row(5, timeout),
    "requeue_before": Row(300, clock),
    "saves_per_job": Row(2, until, 16),
    "save_optim": Row("last", thinned("optimizers"), {24}),
    "keep": Row("last 1", thinned("weights"), {24}),
    "non_persistent_save_interval": Row(12, at("_is_due"), [12, 24]),
    "async_save": Row(False, writes_beside),
    # Evaluation
    "eval_interval": Row(9, evaluations, [9, 18, 24]),
    "eval_iters": Row(3, evaluated_draws, beside={"eval_interval": 6}),
    "eval_mixture": Row(
        "held", lambda case: case.plan.evaluated("r"), [layout.Analysis(mixture="held")],
        beside={"eval_interval": 6}, instead={"eval_interval": None},
    ),
    # Run
    "recipe": Row(
        "solo", lambda case: case.plan.settings(layout.Export(run="r", step=8))["recipe"],
        beside={"model": "solo-tiny", "mixture": "captions"},
        instead={"recipe": "chat", "model": "chat-tiny", "mixture": "talk"},
    ),
    "model": Row("Mistral-tiny-chatml", lambda case: case.plan.sharded("r").model),
    "mixture": Row("held", lambda case: case.plan.analysis("r").mixture),
    "stage": Row(1, frozen, {"language_model", "vision_model"}, beside=LLAVA),
    "freeze": Row(["vision_model"], frozen, {"vision_model"}, beside=LLAVA),
    "start_run": Row(
        "before", start, "data/ckpts/before/iter_0000008",
        beside={"save_interval": 24, "start_iteration": 8}, instead={"start_iteration": None},
    ),
    "start_iteration": Row(
        16, start, "data/ckpts/before/iter_0000016", beside=AGAIN | {"save_interval": 24}
    ),
    "finetune": Row(False, first, (8, 16), beside=AGAIN),
    "load_optim": Row(
        False, lambda case: case.job.takes_optimizer(Path("data/ckpts/before/iter_0000008")),
        beside=AGAIN | {"finetune": False},
    ),
    "init": Row("random", first_weights, DIFFERS),
    "init_method_std": Row(0.5, first_weights, DIFFERS, beside={"init": "random"}),
    "generate": Row(
        [{"prompt": "Hello"}], lambda case: case.plan.answers(), [layout.Generated(run="r", step=8)],
        beside={"exports": [8]},
    ),
    "exports": Row([8, 24], lambda case: [one.step for one in case.plan.exports()]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data that runs train on, and room."""
    root = tmp_path_factory.mktemp("every")
    for name in ("packed", "pictured", "tmp"):
        (root / name).mkdir()
    return {"packed": packed(root / "packed"), "pictured": pictured(root / "pictured"), "tmp": root / "tmp"}


def alike(one, other):
    return list(one) == list(other) if isinstance(one, list | tuple) else one == other


def test_every_key_has_a_row_and_every_row_a_key():
    assert sorted(ROWS) == sorted(Run.model_fields)


@pytest.mark.parametrize("key", ROWS)
def test_what_a_key_changes(key, folders, monkeypatch):
    row = ROWS[key]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with_, without = (Case(row.beside | keys, folders) for keys in ({key: row.value}, row.instead))
    monkeypatch.chdir(with_.place.root)
    found, otherwise = row.shown(with_), row.shown(without)

    assert found != otherwise
    if row.equals is not DIFFERS:
        assert alike(found, row.value if row.equals is None else row.equals)


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.refused])
def test_what_this_hardware_cannot_heed_is_refused_by_name(key):
    row = ROWS[key]
    keys = row.beside | {key: row.value}
    with pytest.raises(ConfigError, match=rf"({'|'.join((key, *row.beside))}) '?\w+'? {row.refused}"):
        check_hardware(Case(keys).settings, gpu=False)


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if not row.refused])
def test_no_other_key_is(key):
    row = ROWS[key]
    check_hardware(Case(row.beside | {key: row.value}).settings, gpu=False)
