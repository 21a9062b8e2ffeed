"""The classic layout on disk: what is in it, and what is refused."""

import argparse
import io
import json
import logging
import pickle
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from plait import files
from plait.cli.main import main
from plait.convert import checkpoint, folders, layouts, torch_dist
from plait.errors import CheckpointError, ConfigError
from plait.models.leaves import root
from plait.models.specs import Spec
from plait.models.weights import FolderTensors, merkle, write_safetensors
from plait.parallel.grid import Grid

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_every_grid_has_the_root_of_its_source(maker, tp, pp):
    hf = maker.solo()
    shards = maker.shards(hf, tp, pp)
    facts = files.check_manifest(shards)["facts"]

    assert facts["merkle"] == files.read_manifest(hf)["facts"]["merkle"] == merkle(FolderTensors(hf))
    assert facts["grid"] == {"tp": tp, "pp": pp}
    assert facts["coverage"]["written_once"]
    assert facts["coverage"]["hf_tensors"] == len(FolderTensors(hf))


def test_the_digest_of_the_tokenizer_is_carried_to_the_shards(maker):
    hf = maker.solo()
    digest = files.digest(maker.vision / "tokenizer.json")

    for folder in (maker.megatron(hf), maker.shards(hf, 2, 1), maker.shards(hf, 1, 2)):
        assert files.read_manifest(folder)["facts"]["tokenizer"] == digest


def test_a_model_that_does_not_say_its_tokenizer_is_refused(maker, tmp_path):
    hf = shutil.copytree(maker.hf(), tmp_path / "hf")
    (hf / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"hf has no tokenizer.json"):
        folders.convert(hf, tmp_path / "out")

    whole = shutil.copytree(maker.megatron(maker.hf()), tmp_path / "whole")
    manifest = files.read_json(whole / "plait.json")
    del manifest["facts"]["tokenizer"]
    files.write_json(whole / "plait.json", manifest)
    (tmp_path / "cut").mkdir()
    with pytest.raises(CheckpointError, match="does not say which tokenizer"):
        folders.shard(whole, tmp_path / "cut", Grid(2, 1))


def test_rotary_buffers_are_left_out_of_a_conversion(maker, tmp_path, caplog):
    caplog.set_level(logging.INFO, "plait")
    hf, whole = maker.hf(), tmp_path / "whole"
    old = shutil.copytree(hf, tmp_path / "old")
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(4)}
    write_safetensors(old, {**FolderTensors(hf), **buffers})
    whole.mkdir()

    facts = folders.convert(old, whole)

    assert facts["merkle"] == files.read_manifest(hf)["facts"]["merkle"]
    assert caplog.records[-1].getMessage().endswith(", 4 rotary buffers (inv_freq) left out")


def test_the_files_are_megatrons(maker):
    shards = maker.shards(maker.hf(), 2, 2)

    assert sorted(path.relative_to(shards).as_posix() for path in shards.rglob("*") if path.is_file()) == [
        "hf_config.json",
        "latest_checkpointed_iteration.txt",
        "plait.json",
        *(f"release/mp_rank_0{tp}_00{pp}/model_optim_rng.pt" for tp in range(2) for pp in range(2)),
        "tensors.json",
    ]
    assert (shards / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (shards / "hf_config.json").read_bytes() == (maker.hf() / "config.json").read_bytes()


def test_a_rank_file_loads_with_namespace_as_the_only_class_allowed_in(maker):
    path = maker.shards(maker.hf(), 2, 1) / "release/mp_rank_01/model_optim_rng.pt"

    assert {*torch.serialization.get_unsafe_globals_in_checkpoint(path)} <= {"argparse.Namespace"}
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)

    assert content.keys() == {"model", "args", "checkpoint_version", "iteration"}
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)
    args = content["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 1)
    assert (args.num_query_groups, args.group_query_attention, args.swiglu) == (2, True, True)
    assert args.padded_vocab_size == 512
    assert args.untie_embeddings_and_output_weights
    assert (args.normalization, args.position_embedding_type) == ("RMSNorm", "rope")
    assert args.params_dtype is torch.float32


def test_a_rank_file_is_read_by_megatrons_own_list_of_classes(maker):
    """As Megatron-LM loads it: torch's default, and the classes that Megatron Core allows in."""
    from megatron.core import safe_globals

    path = maker.shards(maker.mixtral(), 2, 1) / "release/mp_rank_01/model_optim_rng.pt"
    with torch.serialization.safe_globals(safe_globals.SAFE_GLOBALS):
        content = torch.load(path, map_location="cpu")

    assert content["args"].moe_router_topk == 2
    assert all(torch.is_tensor(one) for one in content["model"].values())


def as_megatron_lm_saves(content):
    """The same with all that a training of Megatron-LM writes beside the weights."""
    from megatron.core.enums import ModelType
    from megatron.core.rerun_state_machine import RerunMode, RerunState
    from megatron.core.transformer.enums import AttnBackend

    vars(content["args"]).update(
        attention_backend=AttnBackend.flash, model_type=ModelType.encoder_or_decoder, data_path=[Path("x")],
        exit_signal=signal.SIGTERM, lr=np.float64(1e-3), consumed_train_samples=6400,
    )  # fmt: skip
    states = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}  # noqa: NPY002
    extra = {"linear_qkv": io.BytesIO(b"abc"), "linear_proj": torch.zeros(3, dtype=torch.uint8)}
    own = {f"decoder.layers.0.self_attention.{name}._extra_state": one for name, one in extra.items()}
    return {
        "args": content["args"],
        "checkpoint_version": 3.0,
        "iteration": 100,
        "num_floating_point_operations_so_far": 1e15,
        "model": {**content["model"], **own, "decoder.layers.0.mlp.linear_fc1._extra_state": None},
        "opt_param_scheduler": {"num_steps": 6400},
        "rng_state": [states],
        "rerun_state_machine": {"mode": RerunMode.DISABLED, "state": RerunState.NOT_RUNNING_YET},
    }


def test_a_checkpoint_with_all_that_megatron_lm_saves_is_read(maker, tmp_path):
    hf, there = maker.hf(), tmp_path / "there"
    shutil.copytree(maker.shards(hf, 2, 2) / "release", there / "iter_0000100")
    for path in there.rglob("*.pt"):
        torch.save(as_megatron_lm_saves(torch.load(path, weights_only=False)), path)
    (there / "latest_checkpointed_iteration.txt").write_text("100")

    for number, step in enumerate(([], ["--step=100"])):
        target = tmp_path / f"back{number}"
        assert main(["convert", str(there), str(target), "--to=hf", f"--hf={hf}", *step]) == 0
        assert (target / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_a_whole_model_has_the_true_vocabulary(maker):
    hf = maker.hf()
    state = checkpoint.read_rank(maker.megatron(hf), Grid(), 0, 0)

    assert len(state["embedding.word_embeddings.weight"]) == Spec.of(hf).vocab_size == 259
    assert checkpoint.read_args(maker.megatron(hf), Grid()).padded_vocab_size == 259


def test_equal_models_give_equal_bytes(maker, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        folders.shard(maker.megatron(maker.solo()), tmp_path / name, Grid(2, 1))
    one, two = (sorted((tmp_path / name).rglob("*.pt")) for name in ("one", "two"))

    assert len(one) == 2
    assert [files.digest(path) for path in one] == [files.digest(path) for path in two]


def test_a_name_too_many_or_too_few_is_refused_by_name(maker, tmp_path):
    shards = shutil.copytree(maker.shards(maker.hf(), 1, 2), tmp_path / "x")
    path = checkpoint.rank_file(shards, Grid(pp=2), 0, 1)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    head = content["model"].pop("output_layer.weight")

    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"lacks output_layer.weight"):
        layouts.released(shards, Spec.of(maker.hf()), Grid(pp=2))

    content["model"] |= {"output_layer.weight": head, "output_layer.bias": head[:, 0]}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"has unknown output_layer.bias"):
        layouts.released(shards, Spec.of(maker.hf()), Grid(pp=2))

    content["model"].pop("output_layer.bias")
    content["model"]["output_layer.weight"] = head[:-1]
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"output_layer.weight has shape \(383, 32\), its config says \(384, 32\)"
    ):
        layouts.released(shards, Spec.of(maker.hf()), Grid(pp=2))


def test_transformer_engines_extra_states_are_the_only_names_ignored(maker, tmp_path):
    shards = shutil.copytree(maker.shards(maker.hf(), 1, 1), tmp_path / "x")
    path = checkpoint.rank_file(shards, Grid(), 0, 0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    content["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.zeros(1)
    torch.save(content, path)

    assert (
        root(layouts.released(shards, Spec.of(maker.hf())).stream())
        == (files.read_manifest(maker.hf())["facts"]["merkle"])
    )


def test_what_is_not_a_checkpoint_is_refused(maker, tmp_path):
    shards = shutil.copytree(maker.shards(maker.hf(), 1, 1), tmp_path / "x")
    path = checkpoint.rank_file(shards, Grid(), 0, 0)
    with pytest.raises(CheckpointError, match=r"mp_rank_01/model_optim_rng.pt is missing"):
        checkpoint.read_rank(shards, Grid(tp=2), 1, 0)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="has no 'model' and 'args'"):
        checkpoint.read_rank(shards, Grid(), 0, 0)
    path.write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoint.read_rank(shards, Grid(), 0, 0)
    torch.save({"model": {}, "args": pytest.approx}, path)
    with pytest.raises(CheckpointError, match="has no 'model' and 'args'"):
        checkpoint.read_rank(shards, Grid(), 0, 0)
    (shards / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="does not say 'release'"):
        layouts.released(shards, Spec.of(maker.hf()))


def test_a_pickle_that_runs_something_is_not_run(maker, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    shards = shutil.copytree(maker.shards(maker.hf(), 1, 1), tmp_path / "x")
    torch.save({"model": {}, "args": Evil()}, checkpoint.rank_file(shards, Grid(), 0, 0))
    with pytest.raises(CheckpointError):
        checkpoint.read_rank(shards, Grid(), 0, 0)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"builtins.exec has no place"):
        torch_dist.sources(tmp_path, Spec.of(maker.hf()))

    assert not (tmp_path / "ran").exists()


def test_a_source_that_breaks_its_config_is_refused(maker, tmp_path):
    hf = shutil.copytree(maker.hf(), tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight has shape \(48, 32\), its config says \(50, 32\)"
    ):
        folders.convert(hf, tmp_path / "out")


def test_a_grid_that_cannot_hold_the_model_leaves_nothing(maker, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="2 query groups do not divide among 4"):
        folders.shard(maker.megatron(maker.hf()), tmp_path / "out", Grid(tp=4))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bf16_and_every_kind_of_attention_come_back(maker, tmp_path, groups):
    from safetensors.torch import save_file

    name = f"bf16-{groups}"
    hf = shutil.copytree(maker.hf(f"g{groups}", num_key_value_heads=groups), tmp_path / name)
    (hf / "plait.json").unlink()
    halved = {key: value.bfloat16() for key, value in FolderTensors(hf).items()}
    save_file(halved, hf / "model.safetensors", metadata={"format": "pt"})

    shards = maker.shards(hf, 1, 2)

    assert files.read_manifest(shards)["facts"]["merkle"] == merkle(halved)
