"""What a training job refuses before it starts a process."""

import json
from pathlib import Path

import pytest
import yaml

from plait import files
from plait.config.run import Experts
from plait.data import prints
from plait.data.chat import Message, Sample, Text
from plait.errors import CheckpointError, ConfigError, DataError
from plait.train.job import Job

SETTINGS = {
    "data_streams": None,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "cpu_offloading_num_layers": 0,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "start_run": None,
    "start_iteration": None,
    "finetune": True,
    "params_dtype": "fp32",
    "freeze": [],
    "context_parallel_size": 1,
    "data_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "sequence_parallel": False,
    "recipe": "chat",
    **{key: field.default for key, field in Experts.model_fields.items()},
    "global_batch_size": 2,
    "lr_warmup_iters": 5,
    "lr_warmup_fraction": None,
    "lr_warmup_tokens": None,
    "lr_decay_iters": None,
    "transformer_impl": "local",
    "fp8": None,
    "attention_backend": "auto",
    "tp_comm_overlap": False,
    "apply_rope_fusion": False,
}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_key_value_heads": 4}
START = "data/models/sharded/m-megatron-tp2-pp1"
SHARD = "data/megatron_format/f_d_pack64/shard_00000"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Inputs that fit, made by hand; a change of one is a test."""
    monkeypatch.chdir(tmp_path)

    def make(
        *,
        model=None,
        facts=None,
        grid=None,
        target="data/ckpts/r/iter_0000050",
        train_iters=100,
        name="m",
        mixture=None,
        dtypes=None,
        **keys,
    ):
        for folder, kind, known in (
            (
                START,
                "sharded",
                {"grid": grid or {"tp": 2, "pp": 1}, "tokenizer": "a" * 64, "dtypes": dtypes or {}},
            ),
            (SHARD, "indexed", {"vocab_size": 300, "tokenizer": "a" * 64, **(facts or {})}),
        ):
            Path(folder).mkdir(parents=True)
            files.write_manifest(Path(folder), kind=kind, settings={}, facts=known)
        sizes = {
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        }  # fmt: skip
        own = {} if model and "text_config" in model else sizes
        config = {"architectures": ["LlamaForCausalLM"], **own, **(model or {})}
        Path(START, "hf_config.json").write_text(json.dumps(config))
        Path("data/analysis/x").mkdir(parents=True)
        mixed = mixture or {"sources": [{"prefix": SHARD, "weight": 1.0}]}
        Path("data/analysis/x/mixture.yaml").write_text(yaml.safe_dump(mixed))
        files.write_manifest(Path("data/analysis/x"), kind="analysis", settings={}, facts={})
        files.write_json("data/ckpts/r/schedule.json", {"train_iters": train_iters, "save_interval": 50})
        settings = {**SETTINGS, "model": name, **keys}
        return Job(START, "data/analysis/x", "data/ckpts/r/schedule.json", target, settings)

    return make


def test_inputs_that_fit_are_accepted(job):
    job().check()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"recompute_method": "uniform", "recompute_num_layers": 3},
            ConfigError,
            "cannot be trained so: 2 layers on pipeline_model_parallel_size 1 are 2 in one piece",
        ),
        ({"train_iters": 40}, ConfigError, "iteration 50 of run r is never saved"),
        ({"target": "data/ckpts/r/iter_0000060"}, ConfigError, "iteration 60 of run r is never saved"),
        ({"target": "data/ckpts/r/iter_0000100"}, ConfigError, "is trained from data/ckpts/r/iter_0000050"),
        ({"name": "other"}, ConfigError, "is trained from the sharded model other"),
        ({"grid": {"tp": 1, "pp": 2}}, CheckpointError, "is cut for 1 x 2 grid, the run wants 2 x 1 grid"),
        (
            {"lr_warmup_fraction": 1.0},
            ConfigError,
            "warmup of 100 iterations is not shorter than the run, 100",
        ),
        ({"lr_warmup_tokens": 100 * 2 * 64}, ConfigError, "the warmup of 100 iterations is not shorter"),
        ({"facts": {"tokenizer": "b" * 64}}, DataError, "was made by tokenizer bbbb"),
        ({"model": {"max_position_embeddings": 32}}, DataError, "max_position_embeddings 32"),
        (
            {"expert_model_parallel_size": 2},
            ConfigError,
            "2 needs a mixture of experts, and its model is dense",
        ),
        (
            {"model": MIXTRAL},
            ConfigError,
            "experts over tensor_model_parallel_size 2 need `sequence_parallel`",
        ),
        ({"model": MIXTRAL, "recipe": "solo"}, ConfigError, "'solo' trains no mixture of experts, .* has 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(job, change, error, sentence):
    with pytest.raises(error, match=sentence):
        job(**change).check()


@pytest.mark.parametrize(
    ("source", "run", "fits"),
    [
        ("float32", "fp32", True),
        ("bfloat16", "fp32", True),
        ("bfloat16", "bf16", True),
        ("float32", "bf16", False),
        ("float16", "bf16", False),
        ("bfloat16", "fp16", False),
    ],
)
def test_what_is_frozen_is_not_rounded(job, source, run, fits):
    made = job(dtypes={"vision_model": [source]}, freeze=["vision_model"], params_dtype=run)
    if fits:
        made.check()
        return
    with pytest.raises(CheckpointError, match=f"vision_model of .* has weights of {source}, .* {run}, which"):
        made.check()


def test_what_is_trained_may_be_rounded(job):
    job(dtypes={"language_model": ["float32"]}, freeze=["vision_model"], params_dtype="bf16").check()


def read(job, content=b"tokens", **facts):
    """A job whose one shard has a file and prints of two samples, as its analysis has counted."""
    made = job(facts=facts)
    files.remove(Path(SHARD))
    shard(SHARD, content, facts, "a", "b")
    analysed("x", [SHARD])
    return made


def shard(path, content, facts, *said):
    Path(path).mkdir(parents=True)
    Path(path, "data-text.bin").write_bytes(content)
    samples = [(Sample((Message("user", (Text(word * 30),)),)), f"d/{word}") for word in said]
    with prints.Prints(Path(path)) as out:
        out.extend(prints.rows(samples), [id_ for _, id_ in samples])
    known = {"vocab_size": 300, "tokenizer": "a" * 64, "packs": 1, **facts}
    files.write_manifest(Path(path), kind="indexed", settings={}, facts=known)


def analysed(name, shards, limit=0.01):
    folder = Path("data/analysis", name)
    folder.mkdir(exist_ok=True)
    sources = [{"prefix": one, "weight": 1 / len(shards), "packs": 1} for one in shards]
    mixed = {"sources": sources, "total_instances": len(shards)}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixed))
    settings = {"mixture": {"leak_limit": limit}}
    files.write_manifest(folder, kind="analysis", settings=settings, inputs=shards, facts={})


def test_a_job_looks_at_the_bytes_of_its_data(job):
    made = read(job)
    made.check()
    Path(SHARD, "data-text.bin").write_bytes(b"tokenS")
    with pytest.raises(DataError, match=r"data-text.bin does not have the sha256"):
        made.check()
    made.around["verify_data"] = "none"
    made.check()


def test_a_job_trains_the_data_that_were_counted(job):
    made = read(job)
    files.remove(Path(SHARD))
    shard(SHARD, b"others", {}, "a", "b")
    with pytest.raises(DataError, match=r"mixture -> training: data/analysis/x counted .* it is \w{12} now"):
        made.check()


@pytest.mark.parametrize("key", ["vocabulary", "template"])
def test_a_job_trains_shards_that_were_made_alike(job, key):
    made, other = read(job, **{key: "1" * 64}), SHARD.replace("00000", "00001")
    shard(other, b"others", {key: "2" * 64}, "c")
    analysed("x", [SHARD, other])
    with pytest.raises(
        DataError, match=rf"shard_00000 was made by another {key}, 111111111111, than .*00001"
    ):
        made.check()


@pytest.mark.parametrize("limit", [0.4, 0.5])
def test_a_job_lists_what_it_evaluates_and_trains(job, limit):
    made, held = read(job), SHARD.replace("f_d", "f_held")
    shard(held, b"others", {}, "b", "c")
    analysed("y", [held], limit)
    made.around.update(eval_interval=5, eval_mixture="y")
    if limit < 0.5:
        with pytest.raises(
            DataError, match=r"1 of 2 samples that validate train too, .* d/b is equal to d/b"
        ):
            made.check()
    else:
        made.check()
    assert json.loads(Path(made.run.leaks).read_text()) == {"id": "d/b", "like": "equal", "train": "d/b"}


TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "vision_config": TOWER,
    "text_config": {"max_position_embeddings": 128},
    "image_token_index": 9,
}


def pictured(tokens=16, length=100, image=9):
    """The mixture of an energon dataset, made by a tokenizer with this id of a picture."""
    folder = Path("data/tokenizers/t")
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    files.write_manifest(folder, kind="tokenizer", settings={}, facts={})
    return {
        "tokenizer": str(folder),
        "image_token_id": image,
        "format": {"picture_tokens": tokens},
        "decoder_seq_length": length,
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"image": 8}, "was counted with token 8 for a picture, .* reads token 9 as one"),
        ({"tokens": 15}, "counts 15 tokens a picture, the tower of .* gives 16"),
        ({"pad": 64}, "has 64 rows of tokens, a picture is its token 9 and padding 64"),
        ({"length": 129}, "decoder_seq_length 129, .* has max_position_embeddings 128"),
    ],
)
def test_a_tower_and_its_mixture_must_agree(job, change, sentence):
    pad = change.get("pad")
    mixture = pictured(**{key: value for key, value in change.items() if key != "pad"})
    text = LLAVA["text_config"] | {"vocab_size": 64}
    made = job(model={**LLAVA, "pad_token_id": pad, "text_config": text}, mixture=mixture)
    digest = files.digest("data/tokenizers/t/tokenizer.json")
    files.write_manifest(
        Path(START), kind="sharded", settings={}, facts={"grid": {"tp": 2, "pp": 1}, "tokenizer": digest}
    )
    if sentence is None:
        made.check()
        return
    with pytest.raises((DataError, CheckpointError), match=sentence):
        made.check()


def test_a_mixture_of_another_tokenizer_is_refused(job):
    with pytest.raises(DataError, match="the mixture's tokenizer data/tokenizers/t is"):
        job(model=LLAVA, mixture=pictured()).check()


def test_a_run_that_starts_from_another_takes_no_other_start(job):
    with pytest.raises(ConfigError, match="is trained from data/ckpts/first/iter_0000100, not from"):
        job(start_run="first", start_iteration=100).check()


def test_the_checkpoint_of_another_run_is_read_on_any_grid(job):
    made = job(start_run="first", start_iteration=100)
    start = Path("data/ckpts/first/iter_0000100")
    start.mkdir(parents=True)
    (start / "hf_config.json").write_bytes(Path(START, "hf_config.json").read_bytes())
    facts = {"grid": {"tp": 1, "pp": 2}, "tokenizer": "a" * 64}
    files.write_manifest(start, kind="iteration", settings={}, facts=facts)
    moved = Job(str(start), made.analysis, made.schedule, made.target, made.settings)
    moved.check()
    assert moved.steps == (0, 50)


def checkpoint(folder, inputs, grid=None):
    """A checkpoint that a job can go on from."""
    Path(folder).mkdir(parents=True)
    Path(folder, "hf_config.json").write_bytes(Path(START, "hf_config.json").read_bytes())
    facts = {"grid": grid or {"tp": 2, "pp": 1}, "tokenizer": "a" * 64}
    files.write_manifest(Path(folder), kind="iteration", settings={}, inputs=inputs, facts=facts)
    return folder


def test_a_run_goes_on_with_its_data_and_no_others(job):
    made = job(target="data/ckpts/r/iter_0000100")
    start = checkpoint("data/ckpts/r/iter_0000050", [Path(made.analysis)])
    later = Job(start, made.analysis, made.schedule, made.target, made.settings)
    later.check()
    files.write_manifest(Path(made.analysis), kind="analysis", settings={}, facts={"other": 1})
    with pytest.raises(DataError, match=r"was trained on data/analysis/x of digest \w{12}, it is"):
        later.check()


def test_a_run_may_go_on_where_another_stopped_on_another_grid(job):
    keys = {"start_run": "first", "start_iteration": 50, "finetune": False}
    made = job(target="data/ckpts/r/iter_0000100", **keys)
    start = checkpoint("data/ckpts/first/iter_0000050", [Path(made.analysis)], {"tp": 1, "pp": 2})
    later = Job(start, made.analysis, made.schedule, made.target, made.settings)
    later.check()
    assert later.steps == (50, 100)
