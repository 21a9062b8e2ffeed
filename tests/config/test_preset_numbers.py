"""Hyperparameters of the presets, each beside where its system has it; nothing here is read from config/."""

import pytest
from hub_configs import OWN, PLANS

from plait.config.model import load_file
from plait.config.run import Run

COSINE = {"lr_decay_style": "cosine", "optimizer": "adam", "clip_grad": 1.0, "params_dtype": "bf16"}
SOLO = {
    **COSINE,
    # scripts/megatron/train/curriculum/*.sh: one node of 8, TP 2, PP 1, 4M tokens a batch
    "recipe": "solo", "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1,
    "data_parallel_size": 4, "micro_batch_size": 1, "global_batch_size": 128,
    "lr": 5e-5, "min_lr": 5e-6, "lr_warmup_iters": 200, "weight_decay": 0.1,
    # no flag: defaults of Megatron-LLM's arguments.py
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "loss_roles": ("assistant",),
    # --recompute_granularity full --recompute_method uniform --recompute_num_layers 4 and the rest
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4,
    "use_distributed_optimizer": True, "save_interval": 50,
}  # fmt: skip
CODEACT = {
    **COSINE,
    # finetune_4xA100_4tp_mixture_*.sh and source.sh: four A100 of 40 GB
    "recipe": "chat", "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1,
    "data_parallel_size": 1, "micro_batch_size": 1, "global_batch_size": 32,
    "lr": 1e-5, "min_lr": 1e-6, "lr_warmup_iters": 50,
    # no flag: defaults of Megatron-LLM's arguments.py
    "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8,
    "sequence_parallel": True, "use_distributed_optimizer": True,
    "recompute_granularity": "full", "recompute_method": "uniform",
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "loss_roles": ("assistant",),
}  # fmt: skip
PAI = {
    **COSINE,
    # guide 002's call of run_mcore_llava.sh: dsw 7B 1 256 0.00015 1e-5 576 1024 bf16 4 1 1 true ... 20000 200
    "recipe": "llava", "micro_batch_size": 1, "global_batch_size": 256, "lr": 1.5e-4, "min_lr": 1e-5,
    "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "use_distributed_optimizer": True, "train_iters": 20000, "lr_warmup_iters": 200,
    # what the script fixes: --lr-decay-iters is iterations less warmup; --freeze-LM --freeze-ViT
    "lr_decay_iters": 19800, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "hidden_dropout": 0.1, "attention_dropout": 0.0, "num_workers": 2,
    "freeze": ("language_model", "vision_model"),
    "shuffle_buffer_size": 100, "max_samples_per_sequence": 100,
}  # fmt: skip
LLAVA_JP = {
    **COSINE,
    # scripts/train/run.py: cosine to 1e-8, warmup of 3 %, selective recomputation; guide 003's stages
    "recipe": "llava_jp", "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1,
    "data_parallel_size": 2, "min_lr": 1e-8, "weight_decay": 0.1, "adam_beta2": 0.999,
    "lr_warmup_fraction": 0.03, "recompute_granularity": "selective", "save_interval": 2000,
    "num_workers": 1,
}  # fmt: skip
STAGE_1 = {
    "lr": 1e-3, "global_batch_size": 256, "micro_batch_size": 16, "min_lr": 1e-8, "weight_decay": 0.1,
    "adam_beta2": 0.999, "lr_warmup_fraction": 0.03, "clip_grad": 1.0,
    "freeze": ("language_model", "vision_model"),
}  # fmt: skip
STAGE_2 = {
    **STAGE_1, "lr": 2e-5, "global_batch_size": 128, "micro_batch_size": 1, "freeze": ("vision_model",),
}  # fmt: skip

RUNS = {
    ("solo-mistral-7b", "imagenet21k"): {**SOLO, "train_iters": 1525},
    ("solo-mistral-7b", "stage2"): {**SOLO, "train_iters": 3481, "start_iteration": 1525},
    ("solo-mistral-7b", "stage3"): {**SOLO, "train_iters": 300, "start_iteration": 3481},
    ("codeact-llama2-7b", "seq4096"): {
        **CODEACT, "recompute_num_layers": 8, "train_iters": 3030, "save_interval": 606,
    },
    ("codeact-mistral-7b", "seq16384"): {
        **CODEACT, "recompute_num_layers": 2, "train_iters": 760, "save_interval": 152,
    },
    ("llava-mistral-7b", "mcore-llava"): PAI,
    ("llava-jp-13b", "stage1"): {**LLAVA_JP, **STAGE_1, "start_run": None},
    ("llava-jp-13b", "stage2"): {**LLAVA_JP, **STAGE_2, "start_iteration": 2000},
}  # fmt: skip


def run_of(plan, part):
    runs = load_file(PLANS / f"{plan}.yaml").runs
    (name,) = [name for name in runs if part in name]
    return runs[name]


@pytest.mark.parametrize(("plan", "part"), RUNS)
def test_a_preset_has_the_numbers_of_its_system(plan, part):
    run, wanted = run_of(plan, part), RUNS[plan, part]
    assert {key: getattr(run, key) for key in wanted} == wanted


def test_every_run_of_every_preset_is_in_the_table():
    runs = {path.stem: len(load_file(path).runs) for path in PLANS.glob("*.yaml") if path.stem not in OWN}
    assert {plan: sum(one == plan for one, _ in RUNS) for plan in runs} == runs


@pytest.mark.parametrize(("stage", "wanted"), [(1, STAGE_1), (2, STAGE_2)])
def test_a_stage_sets_what_llava_jp_sets(stage, wanted):
    run = Run(recipe="llava", model="m", mixture="x", stage=stage, train_iters=4, save_interval=2)
    assert {key: getattr(run, key) for key in wanted} == wanted


def test_what_the_originals_fix_in_data_and_models():
    solo, pai = (load_file(PLANS / f"{name}.yaml") for name in ("solo-mistral-7b", "llava-mistral-7b"))
    assert {mixture.pack for mixture in solo.mixtures.values()} == {32768}
    assert {solo.formats["mmistral"].patch_size, solo.formats["mmistral"].max_resolution} == {32, 1024}
    written = pai.datasets["LLaVA-Pretrain"].energon
    assert (written.shard_name, written.samples_per_shard) == ("wds/pretrain-{}.tar", 10000)
    assert tuple(written.split) == (9, 1, 0)
    model = pai.raw_hf["LLaVA-Mistral-7B"]
    assert (model.projector_hidden_size, model.projector_bias, model.initializer_range) == (
        14336,
        False,
        0.014,
    )
    assert (model.vision_feature_layer, model.drop_class_token) == (-1, True)
    assert pai.mixtures["pretrain"].decoder_seq_length == 1024
    for name, pack in (("codeact-llama2-7b", 4096), ("codeact-mistral-7b", 16384)):
        plan = load_file(PLANS / f"{name}.yaml")
        assert plan.mixtures["codeact"].pack == pack
        assert plan.formats["chatml"].packing == "sorted_next_fit"
