"""From any layout and grid to any other, file to file: what is read, what is written, what is refused."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import grids, spec_of, specs, weights

from plait import files
from plait.cli.main import main
from plait.convert import checkpoint, compare, folders, layouts, stream, tables
from plait.errors import CheckpointError, ConfigError, DataError
from plait.models import safe
from plait.models.leaves import root
from plait.models.specs import Spec
from plait.models.stored import Stored
from plait.models.weights import FolderTensors, lay_out, merkle
from plait.parallel.grid import Grid

WEIGHTS = "model.safetensors"


def megatron_config(spec):
    """A config.json of which this is the spec."""
    config = {
        "architectures": [spec.architecture],
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "num_hidden_layers": spec.num_layers,
        "sliding_window": None,
        "tie_word_embeddings": spec.tied,
        **{
            key: getattr(spec, key)
            for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings",
            )
        },
    }  # fmt: skip
    if spec.num_experts:
        config |= {"num_local_experts": spec.num_experts, "num_experts_per_tok": spec.experts_per_token}
    return config


def folder_of(spec, root, dtype=torch.float32):
    """A Hugging Face folder of random weights."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(megatron_config(spec)))
    save_file(weights(spec, 5, dtype), root / WEIGHTS, metadata={"format": "pt"})
    return root


def remade(source, target, grid=Grid(), **keys):  # noqa: B008 - a grid is frozen
    target.mkdir()
    return folders.remake(source, target, grid, **{"to": "classic", **keys})


def test_experts_and_chunks_stand_where_megatron_looks_for_them(tmp_path):
    """Names of folders and keys as Megatron-LM's get_checkpoint_name and its interleaved models have them."""
    spec = spec_of(num_experts=4, experts_per_token=2, num_layers=4)
    source = folder_of(spec, tmp_path / "hf")
    hf = load_file(source / WEIGHTS)
    remade(source, tmp_path / "ep", Grid(2, 2), ep=2)
    remade(source, tmp_path / "flat", Grid(2, 1), ep=2)
    remade(source, tmp_path / "vpp", Grid(1, 2), chunks=2)

    assert sorted(path.name for path in (tmp_path / "ep/release").iterdir()) == [
        f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}" for tp in range(2) for pp in range(2) for ep in range(2)
    ]
    assert (tmp_path / "flat/release/mp_rank_01_001").is_dir()
    path = tmp_path / "ep/release/mp_rank_01_001_001" / checkpoint.FILE
    one = torch.load(path, weights_only=False)["model"]
    # expert 3 of layer 3: the second of the second expert rank, in the second layer of the second stage
    down = hf["model.layers.3.block_sparse_moe.experts.3.w2.weight"]
    assert torch.equal(
        one["decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"], down.chunk(2, dim=1)[1]
    )
    chunked = torch.load(tmp_path / "vpp/release/mp_rank_00_001" / checkpoint.FILE, weights_only=False)
    assert {"model0", "model1"} <= chunked.keys()
    # chunks go round: the second stage has layers 1 and 3
    for chunk, layer in (("model0", 1), ("model1", 3)):
        norm = chunked[chunk]["decoder.layers.0.input_layernorm.weight"]
        assert torch.equal(norm, hf[f"model.layers.{layer}.input_layernorm.weight"])
    assert "output_layer.weight" in chunked["model1"].keys() - chunked["model0"].keys()
    assert chunked["args"].virtual_pipeline_model_parallel_size == 2


@settings(max_examples=15)
@given(specs().flatmap(lambda spec: st.tuples(st.just(spec), grids(spec))), st.integers(20, 300))
def test_blocks_of_any_size_give_the_same_bytes(pair, block):
    import tempfile
    from pathlib import Path
    from unittest.mock import patch

    spec, grid = pair
    with tempfile.TemporaryDirectory() as name, patch.object(stream, "BLOCK", block):
        here = Path(name)
        state = weights(spec, 5)
        model = _stored(state, here / "hf")
        placed = checkpoint.lay_out(here / "cut", spec, grid, model.dtypes)
        leaves = model.stream(placed)
        assert root(leaves) == merkle(state)
        assert {one.name: one.stored.tensor().shape for one in placed}
        again = layouts.Model(placed, spec.shapes).stream()
        assert again == leaves


def _stored(state, folder):
    folder.mkdir()
    save_file(state, folder / WEIGHTS)
    found = safe.read(folder / WEIGHTS)
    from plait.convert.forms import identity

    shapes = {name: one.shape for name, one in found.items()}
    form = identity(shapes)
    return stream.Model([stream.Placed(name, found[name], form[name]) for name in found], shapes)


def test_a_checkpoint_padded_by_another_rule_is_read(maker, tmp_path):
    """Megatron-LM's make_vocab_size_divisible_by may be any; here 8, so 264 rows over two ranks."""
    spec = Spec.of(maker.hf())
    target = shutil.copytree(maker.shards(maker.hf(), 2, 1), tmp_path / "x")
    for tp in range(2):
        path = checkpoint.rank_file(target, Grid(2, 1), tp, 0)
        content = torch.load(path, weights_only=False)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            whole = torch.cat([_rank(maker, tp)[name] for tp in range(2)])[:264]
            content["model"][name] = whole.chunk(2)[tp].clone()
        content["args"].make_vocab_size_divisible_by = 4
        torch.save(content, path)

    assert root(layouts.released(target, spec).stream()) == merkle(FolderTensors(maker.hf()))
    with pytest.raises(
        CheckpointError, match=r"264 rows, padded by .* 4; training has 512, by 128"
    ) as refused:
        checkpoint.read_rank(target, Grid(2, 1), 0, 0)
    assert "plait convert" in refused.value.hint


def _rank(maker, tp):
    path = checkpoint.rank_file(maker.shards(maker.hf(), 2, 1), Grid(2, 1), tp, 0)
    return torch.load(path, weights_only=False)["model"]


# The command outside data/


def test_a_checkpoint_goes_to_another_grid_and_to_hugging_face_by_one_command(maker, tmp_path, capsys):
    source = maker.hf()
    root = merkle(FolderTensors(source))
    for words in (
        [str(source), f"{tmp_path}/cut", "--tp", "2", "--pp", "2"],
        [f"{tmp_path}/cut", f"{tmp_path}/back", "--to", "hf", "--hf", str(source)],
    ):
        assert main(["convert", *words]) == 0
        assert root in capsys.readouterr().out
    assert main(["diff", str(source), f"{tmp_path}/cut"]) == 0
    assert "39 of 39 tensors are bit-equal" in capsys.readouterr().out
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert main(["verify", f"{tmp_path}/back"]) == 0
    assert root in capsys.readouterr().out


def test_words_that_a_path_says_are_refused_inside_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["data/models/raw_hf/m", "data/models/raw/m-megatron", "--tp", "2"]
    assert main(["convert", *words]) == 2
    assert "--tp was given for data/models/raw/m-megatron" in capsys.readouterr().err


def test_a_tensor_that_differs_is_told_with_how_far_and_where(maker, tmp_path, capsys):
    source = maker.hf()
    other = shutil.copytree(source, tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] += 0.25
    tensors["extra"] = torch.zeros(2)
    save_file({k: v for k, v in tensors.items() if k != "extra"}, other / WEIGHTS, metadata={"format": "pt"})

    with pytest.raises(SystemExit) as left:
        main(["diff", str(source), str(other)])

    said = capsys.readouterr().out
    assert left.value.code == 1
    assert "model.layers.2.mlp.down_proj.weight differs in 1 of 1536 elements, most by 0.25 at [3, 5]" in said
    assert "38 of 39 tensors are bit-equal" in said


@pytest.mark.parametrize("kind", ["shards", "whole"])
def test_verify_names_the_first_tensor_that_is_not_what_it_was(maker, tmp_path, kind):
    source = maker.shards(maker.hf(), 2, 1) if kind == "shards" else maker.megatron(maker.hf())
    target = shutil.copytree(source, tmp_path / "x")
    root, tensors = compare.check(target)
    assert (root, tensors) == (files.read_manifest(maker.hf())["facts"]["merkle"], 39)

    (one,) = [p for p in layouts.checkpoint.sources(target, Spec.of(maker.hf())) if _is(p, "layers.1.mlp")][
        :1
    ]
    with one.stored.path.open("r+b") as file:
        file.seek(one.stored.offset + 5)
        byte = file.read(1)[0]
        file.seek(one.stored.offset + 5)
        file.write(bytes([byte ^ 1]))

    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.gate_proj.weight has sha256"):
        compare.check(target)


def _is(placed, part):
    return (
        placed.held.copy == 0 and f"decoder.{part}.linear_fc1" in placed.name and placed.stored.shape[0] > 1
    )


@pytest.mark.parametrize(
    ("kind", "said", "named"),
    [
        ("hf", "39 tensors as they were made; merkle ", "model.layers.1.mlp.up_proj.weight has sha256"),
        ("tower", "tensors as", "post_layernorm.weight has sha256"),
        ("llava", "tensors as", "multi_modal_projector.linear_1.bias has sha256"),
        ("plain", "files as", "tokenizer.json does not have the sha256 that plait.json records"),
    ],
)
def test_verify_compares_any_artifact_with_its_manifest(maker, tmp_path, kind, said, named, capsys):
    source = maker.plain if kind == "plain" else getattr(maker, kind)()
    target = shutil.copytree(source, tmp_path / "x")
    assert main(["verify", str(target)]) == 0
    assert said in capsys.readouterr().out

    if kind == "plain":
        _flip(target / "tokenizer.json", -1)
    else:
        stored = FolderTensors(target).placed[named.split()[0]]
        _flip(stored.path, stored.offset + stored.nbytes - 1)

    assert main(["verify", str(target)]) == 2
    assert named in capsys.readouterr().err


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kept", [True, False])
def test_verify_finds_a_model_that_is_not_what_its_manifest_says(maker, tmp_path, capsys, kept):
    """Files and manifest agree, the Merkle root is another's; older folders have no digests of tensors."""
    target = shutil.copytree(maker.hf(), tmp_path / "x")
    state = load_file(target / WEIGHTS)
    state["model.norm.weight"][0] += 1
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    facts = files.read_manifest(target)["facts"]
    for name in ("plait.json",) if kept else ("plait.json", "tensors.json"):
        (target / name).unlink()
    files.write_manifest(target, kind="hf_model", settings={}, facts=facts)

    assert main(["verify", str(target)]) == 2
    now = merkle(FolderTensors(target))
    said = "model.norm.weight has sha256" if kept else f"Merkle root {now[:12]}, not {facts['merkle'][:12]}"
    assert said in capsys.readouterr().err


def test_verify_refuses_digests_of_tensors_that_are_another_models(maker, tmp_path, capsys):
    target = shutil.copytree(maker.hf(), tmp_path / "x")
    shutil.copyfile(maker.tower() / "tensors.json", target / "tensors.json")

    assert main(["verify", str(target)]) == 2
    assert "tensors.json does not have the Merkle root that plait.json records" in capsys.readouterr().err


def test_verify_compares_a_file_with_what_its_folder_or_ledger_records(maker, tmp_path, capsys):
    target = shutil.copytree(maker.hf(), tmp_path / "x")
    shard = tmp_path / "data/processed/talks/shard_00000.jsonl.gz"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"some records")
    ledger = {"bytes": 12, "sha256": files.digest(shard), "kept": 3}
    files.write_json(shard.with_name("shard_00000.ledger.json"), ledger)
    fetched = tmp_path / f"data/hub/models--us--tiny/{40 * 'a'}/pictures/a.zip"
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(b"pictures")
    record = tmp_path / f"data/hub/models--us--tiny/{40 * 'a'}.checked/pictures/a.zip.json"
    files.write_json(record, {"bytes": 8, "sha256": files.digest(fetched)})
    recorded = {target / "config.json": "plait.json", shard: "shard_00000.ledger.json", fetched: record.name}
    for path, name in recorded.items():
        assert main(["verify", str(path)]) == 0
        assert f"{path.stat().st_size} bytes as they were made; sha256 " in capsys.readouterr().out
        _flip(path, 5)
        assert main(["verify", str(path)]) == 2
        assert f"{path} does not have the sha256 that {name} records" in capsys.readouterr().err
    shard.unlink()
    assert main(["verify", str(shard)]) == 2
    assert f"{shard} is missing; shard_00000.ledger.json lists it" in capsys.readouterr().err


def test_verify_says_of_a_file_that_nothing_is_recorded_of_it(tmp_path, capsys):
    schedule = tmp_path / "data/ckpts/run/schedule.json"
    shard = tmp_path / "data/processed/talks/shard_00000.jsonl.gz"
    for path, why in (
        (schedule, "no plait.json lists its digest"),
        (shard, f"there is no {shard.with_name('shard_00000.ledger.json')}"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert main(["verify", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"error: {path} cannot be compared with what it was: {why}\n" in said
        assert "Traceback" not in said


def test_verify_finds_a_changed_padding_row_too(maker, tmp_path):
    target = shutil.copytree(maker.shards(maker.hf(), 2, 1), tmp_path / "x")
    path = checkpoint.rank_file(target, Grid(2, 1), 1, 0)
    content = torch.load(path, weights_only=False)
    content["model"]["output_layer.weight"][-1] = 1.0
    torch.save(content, path)
    with pytest.raises(DataError, match=r"mp_rank_01/model_optim_rng.pt"):
        compare.check(target)


# Memory and time


ALONE = """
import json, sys, time
from pathlib import Path
import numpy, torch
from plait.convert import checkpoint, layouts
from plait.parallel.grid import Grid

def peak():
    # getrusage begins with the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1000

source, target = map(Path, sys.argv[1:])
before, began = peak(), time.process_time()
"""
TOLD = "\nprint(json.dumps([time.process_time() - began, peak() - before]))"
PLAN = """
spec, model = layouts.opened(source)
layouts.coverage(spec, Grid(8, 8))
model.check(checkpoint.lay_out(target / "cut", spec, Grid(8, 8), model.dtypes))
checkpoint.write_tracker(target / "cut")
back = layouts.released(target / "cut", spec)
back.check(checkpoint.lay_out(target / "other", spec, Grid(4, 4), back.dtypes))
"""
CONVERT = """
spec, model = layouts.opened(source)
model.stream(checkpoint.lay_out(target, spec, Grid(2, 2), model.dtypes))
checkpoint.write_tracker(target)
"""


def alone(program, source, target):
    """Run it in a process of its own: processor seconds, and megabytes above what it had with all modules."""
    words = [sys.executable, "-c", ALONE + program + TOLD, source, target]
    told = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(told.stdout)


def with_room(spec, folder):
    """A Hugging Face folder of holes, and where its tensors stand."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(megatron_config(spec)))
    return lay_out(folder, dict.fromkeys(spec.shapes, "bfloat16"), spec.shapes)


def test_a_model_of_seventy_billion_is_planned_from_headers_alone(tmp_path):
    """138 GB of holes, to 64 ranks and on to 16: every box is checked, no tensor is read or written."""
    spec = spec_of(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    with_room(spec, tmp_path / "hf")

    seconds, megabytes = alone(PLAN, tmp_path / "hf", tmp_path)

    made = [path.stat() for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(one.st_size for one in made) > 3 * 137e9
    assert sum(one.st_blocks * 512 for one in made) < 100e6
    assert seconds < 30
    assert megabytes < 100
    counts = layouts.coverage(spec, Grid(8, 8))
    assert counts["hf_elements"] == 68_976_648_192
    assert counts["rank_tensors"] == 8 * (80 * 6 + 3)


@pytest.mark.parametrize("layers", [2, pytest.param(20, marks=pytest.mark.long)], ids=["0.4 GB", "2 GB"])
def test_memory_does_not_grow_with_the_model(tmp_path, layers):
    spec = spec_of(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    source = tmp_path / "hf"
    stored = with_room(spec, source)
    with (source / WEIGHTS).open("r+b") as file:
        draw = np.random.default_rng(0)
        for one in stored.values():
            file.seek(one.offset)
            file.write(draw.integers(0, 256, one.nbytes, dtype=np.uint8).tobytes())

    _, megabytes = alone(CONVERT, source, tmp_path / "cut")

    assert megabytes < 100
    assert layouts.released(tmp_path / "cut", spec).stream() == layouts.of_hf(source, spec).stream()


# What is torn, foreign or hostile


def headed(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "overlapping": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b begins at byte"),
    "a hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "b begins at byte"),
    "beyond the file": ({"a": entry(), "b": entry(offsets=(8, 16))}, 12, "its tensors end at byte"),
    "bytes of no tensor": ({"a": entry()}, 12, "its tensors end at byte"),
    "negative offsets": ({"a": entry(offsets=(-8, 0))}, 8, "data_offsets"),
    "backwards": ({"a": entry(offsets=(8, 0))}, 8, "data_offsets"),
    "negative sizes": ({"a": entry(shape=(-1, -2))}, 8, "shape"),
    "absurd shape": ({"a": entry(shape=(2**62, 2**62))}, 8, "data_offsets"),
    "a fraction": ({"a": entry(shape=(2.0,))}, 8, "shape"),
    "true for one": ({"a": entry(shape=(True, 2))}, 8, "shape"),
    "an unknown type": ({"a": entry(dtype="F128")}, 8, "is of type 'F128'"),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), 8, "a name stands twice"),
    "no object": (b"[1, 2]", 0, "is no object"),
    "no JSON": (b"{{{{", 0, "not JSON"),
    "a deep nest": (b"[" * 100_000, 0, "not JSON"),
    "an entry of text": ({"a": "b"}, 0, "has no dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_a_sentence(name, tmp_path):
    header, size, sentence = HEADERS[name]
    path = headed(tmp_path / WEIGHTS, header, bytes(size))
    with pytest.raises(CheckpointError, match=sentence) as refused:
        safe.read(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("length", [0, 7, 8, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_not_read(length, tmp_path):
    path = tmp_path / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        safe.read(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_rank_file_is_a_sentence_or_the_same_tensors(maker, data):
    """Any byte of the pickle or of the directory: never another exception, never tensors of other shapes."""
    from plait.models.archive import Archive

    path = checkpoint.rank_file(maker.shards(maker.hf(), 2, 1), Grid(2, 1), 0, 0)
    content = bytearray(path.read_bytes())
    known = {name: one.shape for name, one in Archive(path).content["model"].items()}
    first = min(one.offset for one in Archive(path).content["model"].values())
    places = st.integers(0, first) | st.integers(len(content) - 4000, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    broken = maker.root / f"broken-{os.getpid()}.pt"
    broken.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        found = Archive(broken).content
        model = found["model"] if isinstance(found, dict) else {}
        assert all(one.shape for one in model.values() if isinstance(one, Stored)) or known
    except (CheckpointError, KeyError):
        pass


def test_a_tensor_that_ends_beyond_its_file_leaves_no_output(maker, tmp_path):
    source = shutil.copytree(maker.shards(maker.hf(), 2, 1), tmp_path / "x")
    path = checkpoint.rank_file(source, Grid(2, 1), 1, 0)
    os.truncate(path, path.stat().st_size // 2)
    assert main(["convert", str(source), str(tmp_path / "y"), "--tp", "1"]) == 2
    assert not [one for one in tmp_path.iterdir() if one.name != "x"]


def test_shards_of_two_models_do_not_pass_for_one(maker, tmp_path):
    source = shutil.copytree(maker.shards(maker.hf(), 2, 1), tmp_path / "x")
    path = checkpoint.rank_file(source, Grid(2, 1), 1, 0)
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.1.input_layernorm.weight"] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"not another rank's: they hold different copies of"):
        layouts.released(source, Spec.of(maker.hf())).stream()


def test_a_rank_in_anothers_place_is_refused(maker, tmp_path):
    source = shutil.copytree(maker.shards(maker.hf(), 1, 2), tmp_path / "x")
    shutil.copyfile(
        source / "release/mp_rank_00_000/model_optim_rng.pt",
        source / "release/mp_rank_00_001/model_optim_rng.pt",
    )
    with pytest.raises(CheckpointError, match=r"mp_rank_00_001/model_optim_rng.pt lacks"):
        layouts.released(source, Spec.of(maker.hf()))


def test_mixed_types_in_one_tensor_are_refused_by_name(maker, tmp_path):
    source = shutil.copytree(maker.hf(), tmp_path / "x")
    tensors = load_file(source / WEIGHTS)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "y").mkdir()
    with pytest.raises(CheckpointError, match=r"linear_qkv.weight is made of bfloat16 and float32"):
        folders.convert(source, tmp_path / "y")


def test_a_full_disk_leaves_nothing(maker, tmp_path):
    """A limit on the size of files stands for the disk's end: writing beyond it fails as ENOSPC does."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000));"
        "from plait.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["convert", str(maker.hf()), str(tmp_path / "y"), "--tp", "2"]
    ended = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "error:" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


# What a reviewer found


def test_a_torch_dist_checkpoint_of_another_size_is_refused_by_name(tmp_path):
    source = folder_of(spec_of(), tmp_path / "hf")
    remade(source, tmp_path / "iter_0000001", to="torch_dist")
    path = tmp_path / "iter_0000001/hf_config.json"
    config = json.loads(path.read_text())
    for change in (
        {"num_hidden_layers": 2},
        {"intermediate_size": 16},
        {"hidden_size": 8},
        {"vocab_size": 700},
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=r"has shape \(.*, its config says \("):
            layouts.opened(tmp_path / "iter_0000001")


def test_a_step_of_a_run_takes_its_config_along(tmp_path):
    source = folder_of(spec_of(), tmp_path / "hf", torch.bfloat16)
    (tmp_path / "run").mkdir()
    remade(source, tmp_path / "run/iter_0000100", to="torch_dist")
    remade(tmp_path / "run", tmp_path / "cut", Grid(2, 1), step=100)
    facts = remade(tmp_path / "cut", tmp_path / "back", to="hf")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    assert config == json.loads((source / "config.json").read_text())
    assert facts["merkle"] == merkle(FolderTensors(source))


def test_the_folder_of_another_model_is_not_taken_for_its_own(tmp_path):
    source = folder_of(spec_of(), tmp_path / "hf")
    other = folder_of(spec_of(rope_theta=5e5), tmp_path / "other")
    for origin, sentence in ((other, "is not"), (tmp_path / "nowhere", r"has no config.json")):
        (tmp_path / "x").mkdir()
        with pytest.raises(CheckpointError, match=sentence):
            folders.remake(source, tmp_path / "x", Grid(), to="classic", hf=origin)
        (tmp_path / "x").rmdir()


@pytest.mark.parametrize("kind", ["shards", "megatron"])
def test_a_flipped_bit_of_the_source_is_found_on_the_way(maker, tmp_path, kind):
    source = maker.shards(maker.hf(), 2, 1) if kind == "shards" else maker.megatron(maker.hf())
    target = shutil.copytree(source, tmp_path / "x")
    one = next(p for p in checkpoint.sources(target, Spec.of(maker.hf())) if _is(p, "layers.1.mlp"))
    with one.stored.path.open("r+b") as file:
        file.seek(one.stored.offset + 5)
        byte = file.read(1)[0]
        file.seek(one.stored.offset + 5)
        file.write(bytes([byte ^ 1]))
    (tmp_path / "y").mkdir()
    with pytest.raises(
        CheckpointError, match=r"not what it was .* model.layers.1.mlp.gate_proj.weight has sha256"
    ):
        folders.remake(target, tmp_path / "y", Grid(), to="hf")


@pytest.mark.parametrize(("experts", "ep", "legal"), [(4, 3, "1, 2, 4"), (4, 8, "1, 2, 4"), (0, 2, "1")])
def test_experts_that_do_not_divide_are_refused(experts, ep, legal, tmp_path):
    keys = {"num_experts": experts, "experts_per_token": 2} if experts else {}
    source = folder_of(spec_of(**keys), tmp_path / "hf")
    with pytest.raises(ConfigError, match=f"do not divide among {ep} expert") as refused:
        remade(source, tmp_path / "x", ep=ep)
    assert refused.value.hint == f"ep may be {legal}"


def test_a_parameter_by_two_names_is_refused(maker, tmp_path):
    source = shutil.copytree(maker.shards(maker.hf(), 2, 1), tmp_path / "x")
    path = checkpoint.rank_file(source, Grid(2, 1), 0, 0)
    content = torch.load(path, weights_only=False)
    norm = "decoder.layers.0.input_layernorm.weight"
    content["model"][tables.engine_name(norm)] = content["model"][norm] + 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="stands there by two names"):
        layouts.released(source, Spec.of(maker.hf()))


def test_numbers_that_are_none_are_equal_to_themselves(tmp_path):
    source = folder_of(spec_of(), tmp_path / "hf")
    tensors = load_file(source / WEIGHTS)
    tensors["model.layers.0.input_layernorm.weight"][2] = float("nan")
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    remade(source, tmp_path / "cut", Grid(2, 1))
    spec, model = layouts.opened(tmp_path / "cut")
    assert dict(layouts.whole(model, spec))["decoder.layers.0.input_layernorm.weight"].isnan().any()


def test_words_of_another_layout_are_refused(maker, tmp_path, capsys):
    assert main(["convert", str(maker.hf()), f"{tmp_path}/x", "--to", "hf", "--tp", "2"]) == 2
    assert "--tp says nothing of a hf target" in capsys.readouterr().err


def test_old_weights_do_not_go_along(maker, tmp_path):
    source = shutil.copytree(maker.hf(), tmp_path / "x")
    for name in ("pytorch_model.bin", "tf_model.h5", "pytorch_model.bin.index.json"):
        (source / name).write_bytes(b"old")
    remade(source, tmp_path / "y", to="hf")
    assert not [path.name for path in (tmp_path / "y").iterdir() if path.suffix in (".bin", ".h5")]
