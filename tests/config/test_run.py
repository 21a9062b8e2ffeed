"""The keys of a run are checked against one another."""

from pathlib import Path

import pytest
import yaml

from plait import layout
from plait.config import Plan
from plait.config.model import load
from plait.config.run import world_size
from plait.errors import ConfigError

BASE = yaml.safe_load((Path(__file__).parents[2] / "config/config.yaml").read_text())
WRONG = {
    "sequence parallel alone": ({"sequence_parallel": True}, "needs tensor_model_parallel_size 2 or more"),
    "a constant scale": (
        {"params_dtype": "fp16", "loss_scale": 64.0, "hysteresis": 3},
        "`hysteresis` is read only without `loss_scale`",
    ),
    "several nodes here": (
        {"launch": "local", "nodes": 2, "pipeline_model_parallel_size": 2},
        "`launch: local` starts every process on this machine, and `nodes` is 2",
    ),
    "gathered early": ({"overlap_param_gather": True}, "`overlap_param_gather` needs"),
    "chunks of one stage": (
        {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
        "virtual_pipeline_model_parallel_size 2 needs pipeline_model_parallel_size 2 or more",
    ),
    "micro-batches of chunks": (
        {"virtual_pipeline_model_parallel_size": 2, "global_batch_size": 6},
        "pipeline_model_parallel_size 2, and the run has 3: global_batch_size 6 / .micro_batch_size 2 x",
    ),
    "how many layers": ({"recompute_granularity": "full"}, "needs `recompute_method` and"),
    "layers of what": ({"recompute_num_layers": 2}, "need `recompute_granularity: full`"),
    "two warmups": ({"lr_warmup_tokens": 100}, "has one warmup, not lr_warmup_iters and lr_warmup_tokens"),
    "a warmup from above": ({"lr_warmup_init": 1.0}, "`lr_warmup_init` 1.0 is above `lr` 0.005"),
    "a fall that rises": ({"min_lr": 1.0}, "`min_lr` 1.0 is above `lr` 0.005"),
    "the end of no fall": ({"lr_decay_style": "constant"}, "`min_lr` is read only with `lr_decay_style: cos"),
    "a start of no warmup": (
        {"lr_warmup_init": 1e-6, "lr_warmup_iters": 0}, "is read only with a warmup: lr_warmup_iters, lr_wa",
    ),
    "all warmup": (
        {"epochs": None, "train_iters": 100, "lr_warmup_iters": 100},
        "the warmup of 100 iterations is not shorter than the run, 100",
    ),
    "a warmup beyond the fall": (
        {"epochs": None, "train_iters": 100, "lr_decay_iters": 4},
        "the warmup of 5 iterations is not shorter than lr_decay_iters, 4",
    ),
    "nodes of no even share": (
        {"nodes": 3, "data_parallel_size": 2},
        r"processes \(tensor_model_parallel_size 1 x pipeline_model_parallel_size 2 x context_p.*\) evenly",
    ),
    "too few GPUs": ({"gpu_ids": [0]}, r"names 1 GPUs, the run has 2 processes on a machine \(tensor_model_"),
    "an optimizer of nobody": ({"load_optim": False}, "`load_optim` is read only with `finetune: False`"),
    "two lengths": ({"train_tokens": 100}, "either `epochs` or `train_iters`, or `train_tokens`"),
    "a batch of three copies": ({"data_parallel_size": 3}, "micro_batch_size 2 x data_parallel_size 3"),
    "a range": ({"skip_train_iteration_range": ["9-3"]}, "'9-3' is no range of iterations"),
    "momentum of none": ({"sgd_momentum": 0.5}, "`sgd_momentum` is read only with `optimizer: sgd`"),
    "a scale of bf16": ({"loss_scale": 8.0}, "`loss_scale` is read only with `params_dtype: fp16`"),
    "an amax of none": ({"fp8_amax_history_len": 4}, "is read only with `fp8: hybrid or e4m3`"),
    "a share of nothing": ({"optimizer_offload_fraction": 0.5}, "with `optimizer_cpu_offload: True`"),
    "fp8 without its layers": ({"fp8": "hybrid"}, "fp8 'hybrid' would be read by Transformer Engine's"),
    "attention of others": ({"attention_backend": "flash"}, "attention_backend 'flash' would be read by"),
    "talk of no parts": (
        {"transformer_impl": "transformer_engine", "tp_comm_overlap": True}, "needs `sequence_parallel`",
    ),
    "nothing trained": (
        {"freeze": ["vision_model", "language_model", "vision_projection"]}, "nothing is left to train",
    ),
    "an evaluation that never is": ({"eval_iters": 3}, "`eval_iters` is read only with `eval_interval`"),
    "a val split of packs": ({"eval_interval": 5}, "packed data, which have no val split"),
    "what it trains on": ({"eval_interval": 5, "eval_mixture": "talk"}, "trains on datasets.dialogues and"),
    "pictures of energon": ({"eval_interval": 5, "eval_mixture": "english"}, "with format 'chatml' and eval"),
    "no mixture": ({"eval_interval": 5, "eval_mixture": "x"}, "eval_mixture names 'x', which is not"),
    "an entity of no project": ({"wandb_entity": "lab"}, "`wandb_entity` is read only with `wandb_project`"),
    "pieces": ({"context_parallel_size": 3}, "sequences of 256 tokens do not divide into 6 pieces"),
}  # fmt: skip


MIXTRAL = {"kind": "init_mixtral", "tokenizer": BASE["raw_hf"]["Mistral-tiny"]["tokenizer"]}
LONGER = {"kind": "extend", "base": "Mixtral-tiny", "tokenizer": "mistral-chatml"}
EXPERTS = {
    "experts that do not divide": (
        {"expert_model_parallel_size": 3, "data_parallel_size": 3, "global_batch_size": 12},
        "expert_model_parallel_size 3 does not divide the 8 experts of a layer; it may be 1, 2, 4, 8",
    ),
    "processes that do not divide": (
        {"expert_model_parallel_size": 4, "data_parallel_size": 2},
        "expert_model_parallel_size 4 does not divide data_parallel_size 2 x context_parallel_size 1",
    ),
    "tensors without sequences": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": False},
        "experts over tensor_model_parallel_size 2 need `sequence_parallel`",
    ),
    "grouped products": ({"moe_grouped_gemm": True}, "moe_grouped_gemm True would be read by Transformer"),
    "a balance of no weight": (
        {"moe_router_load_balancing_type": "seq_aux_loss"},
        "`moe_router_load_balancing_type` is read only with `moe_aux_loss_coeff`",
    ),
    "a balance of several sequences": (
        {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "seq_aux_loss"},
        "seq_aux_loss` needs micro_batch_size 1, not 2",
    ),
    "another recipe": ({"recipe": "solo"}, "trained by chat"),
}  # fmt: skip


def mixture_of_experts(**keys):
    """The plan of a run that trains a Mixtral, and its first iteration."""
    models = BASE["raw_hf"] | {"Mixtral-tiny": MIXTRAL, "longer": LONGER}
    run = BASE["runs"]["chat-tiny"] | {"model": "longer", "tensor_model_parallel_size": 1} | keys
    plan = Plan(load(BASE | {"raw_hf": models, "runs": {"chat-tiny": run}}))
    return plan.start(layout.Iteration(run="chat-tiny", iteration=50), None)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_do_not_fit_are_refused_in_planning(name):
    keys, sentence = EXPERTS[name]
    with pytest.raises(ConfigError, match=sentence):
        mixture_of_experts(**keys)


def test_experts_that_fit_are_planned():
    keys = {"expert_model_parallel_size": 2, "data_parallel_size": 2, "moe_aux_loss_coeff": 0.01}
    found = mixture_of_experts(**keys, tensor_model_parallel_size=2, sequence_parallel=True)
    assert str(found) == "data/models/sharded/longer-megatron-tp2-pp2"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"expert_model_parallel_size": 2, "data_parallel_size": 2}, "expert_model_parallel_size 2 needs"),
        (
            {"moe_aux_loss_coeff": 0.01},
            "moe_aux_loss_coeff 0.01 needs a mixture of experts, and its model is",
        ),
        ({"moe_token_dispatcher_type": "alltoall"}, "moe_token_dispatcher_type 'alltoall' needs a mixture"),
    ],
)
def test_a_dense_model_has_no_use_for_keys_of_experts(keys, sentence):
    run = BASE["runs"]["chat-tiny"] | keys
    plan = Plan(load(BASE | {"runs": BASE["runs"] | {"chat-tiny": run}}))
    with pytest.raises(ConfigError, match=sentence):
        plan.start(layout.Iteration(run="chat-tiny", iteration=50), None)


def test_a_folder_of_experts_is_planned_by_its_config(tmp_path):
    (tmp_path / "config.json").write_text('{"num_local_experts": 4}')
    models = BASE["raw_hf"] | {"Mistral-tiny-chatml": {"kind": "folder", "path": str(tmp_path)}}
    run = BASE["runs"]["chat-tiny"] | {"expert_model_parallel_size": 3, "data_parallel_size": 3}
    run |= {"global_batch_size": 12}
    plan = Plan(load(BASE | {"raw_hf": models, "runs": {"chat-tiny": run}}))
    with pytest.raises(ConfigError, match="3 does not divide the 4 experts"):
        plan.start(layout.Iteration(run="chat-tiny", iteration=50), None)


def with_run(**keys):
    runs = BASE["runs"] | {"chat-tiny": BASE["runs"]["chat-tiny"] | keys}
    return load(BASE | {"runs": runs})


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_do_not_fit_are_refused(name):
    keys, sentence = WRONG[name]
    with pytest.raises(ConfigError, match=sentence):
        with_run(**keys)


def test_layers_that_do_not_divide_are_refused_when_a_checkpoint_is_planned():
    keys = {"virtual_pipeline_model_parallel_size": 3, "exports": []}
    with pytest.raises(ConfigError, match=r"runs.chat-tiny trains chat-tiny: 4 layers on .* do not divide"):
        Plan(with_run(**keys)).start(layout.Iteration(run="chat-tiny", iteration=50), None)
    uneven = {**BASE["models"]["chat-tiny"], "num_layers_in_first_pipeline_stage": 2}
    runs = {"chat-tiny": BASE["runs"]["chat-tiny"] | {"virtual_pipeline_model_parallel_size": 2}}
    plan = Plan(load(BASE | {"models": BASE["models"] | {"chat-tiny": uneven}, "runs": runs}))
    with pytest.raises(ConfigError, match="2 layers are given to the first or last stage"):
        plan.start(layout.Iteration(run="chat-tiny", iteration=50), None)


def test_a_world_is_the_product_of_its_axes():
    run = with_run(context_parallel_size=2, data_parallel_size=2).runs["chat-tiny"]
    assert run.world_size == world_size(run.model_dump()) == 1 * 2 * 2 * 2


def test_a_run_goes_on_where_another_stopped():
    again = {**BASE["runs"]["chat-tiny"], "start_run": "chat-tiny", "start_iteration": 50, "finetune": False}
    again |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "exports": []}
    plan = Plan(load(BASE | {"runs": BASE["runs"] | {"again": again}}))

    assert plan.start(layout.Iteration(run="again", iteration=100), None) == layout.Iteration(
        run="chat-tiny", iteration=50
    )
    assert plan.start(layout.Iteration(run="again", iteration=150), None) == layout.Iteration(
        run="again", iteration=100
    )
    with pytest.raises(ConfigError, match=r"goes on after iteration 50 .*; it has no iteration 50"):
        plan.start(layout.Iteration(run="again", iteration=50), None)
    for key, value in {"seed": 1, "global_batch_size": 8}.items():
        with pytest.raises(ConfigError, match=f"goes on where runs.chat-tiny stopped, and has {key}"):
            load(BASE | {"runs": BASE["runs"] | {"again": again | {key: value}}})
    for key, value in {"optimizer": "sgd", "params_dtype": "bf16", "use_distributed_optimizer": True}.items():
        other = BASE["runs"] | {"again": again | {key: value}}
        with pytest.raises(ConfigError, match=f"goes on with the optimizer of runs.chat-tiny, and has {key}"):
            load(BASE | {"runs": other})
        load(BASE | {"runs": other | {"again": other["again"] | {"load_optim": False}}})


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_workers", 1), ("micro_batch_size", 4), ("shuffle_buffer_size", 7), ("data_streams", 2)],
)
def test_who_goes_on_reading_by_energon_reads_as_before(key, value):
    before = BASE["runs"]["llava-tiny-stage1"]
    again = {**before, "start_run": "llava-tiny-stage1", "start_iteration": 100, "finetune": False}
    again |= {"train_iters": 200, "exports": [200], key: value}
    with pytest.raises(ConfigError, match=f"goes on where runs.llava-tiny-stage1 stopped, and has {key}"):
        load(BASE | {"runs": BASE["runs"] | {"again": again}})


def test_who_goes_on_reads_as_many_streams_on_any_number_of_copies():
    before = BASE["runs"]["llava-tiny-stage1"] | {"data_streams": 4}
    again = {**before, "start_run": "llava-tiny-stage1", "start_iteration": 100, "finetune": False}
    again |= {"train_iters": 200, "exports": [200]}
    for copies, streams in ((1, None), (2, None), (2, 4)):
        keys = {"data_parallel_size": copies, "data_streams": streams}
        load(BASE | {"runs": BASE["runs"] | {"llava-tiny-stage1": before, "again": again | keys}})
    third = again | {"data_streams": None, "start_run": "again", "start_iteration": 200, "train_iters": 300}
    third |= {"exports": [300], "data_streams": 2}
    runs = BASE["runs"] | {"llava-tiny-stage1": before, "again": again, "third": third}
    with pytest.raises(ConfigError, match=r"runs.again stopped, and has data_streams 2, not 4"):
        load(BASE | {"runs": runs})


PARTS_OF_A_LLAVA = {
    "a tower as language model": ({"base": "CLIP-tiny"}, "has base 'CLIP-tiny' of kind 'init_tower'"),
    "a language model as tower": ({"vision": "Mistral-tiny"}, "has vision 'Mistral-tiny' of kind 'init'"),
    "a LLaVA as language model": ({"base": "LLaVA-JP-tiny"}, "has base 'LLaVA-JP-tiny' of kind 'llava'"),
    "no token of a picture": ({"tokenizer": "mistral-chatml"}, "adds chatml and no `image`"),
    "an odd projector": ({"projector_hidden_size": 33}, "33, which is not a multiple of tensor_model_"),
    "a std of nothing drawn": ({"projector": "p.safetensors", "initializer_range": 0.1}, "from a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS_OF_A_LLAVA)
def test_parts_that_make_no_llava_are_refused(name):
    change, sentence = PARTS_OF_A_LLAVA[name]
    models = BASE["raw_hf"] | {"LLaVA-tiny": BASE["raw_hf"]["LLaVA-tiny"] | change}
    with pytest.raises(ConfigError, match=sentence):
        load(BASE | {"raw_hf": models})


def test_pictures_that_exports_are_asked_about_must_be_there(tmp_path):
    prompt = {"prompt": "What is it?", "image": str(tmp_path / "gone.png")}
    with pytest.raises(ConfigError, match=r"asks about .*gone\.png, and raw_hf.Mistral-tiny-chatml sees no"):
        with_run(generate=[prompt])
    runs = BASE["runs"] | {"llava-tiny-stage1": BASE["runs"]["llava-tiny-stage1"] | {"generate": [prompt]}}
    plan = Plan(load(BASE | {"runs": runs}))
    asked = layout.Generated(run="llava-tiny-stage1", step=100)
    with pytest.raises(ConfigError, match=r"generate\[0\]\.image: .*gone\.png does not exist"):
        plan.inputs(asked)
    (tmp_path / "gone.png").write_bytes(b"")
    assert plan.inputs(asked)
