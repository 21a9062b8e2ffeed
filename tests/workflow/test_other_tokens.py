"""A LLaVA whose picture and padding are tokens that its tokenizer had before: from records to captions."""

import base64
import json
import os
from pathlib import Path

import pytest
import torch
from folders import tokenizer_folder
from greedy import trained_tokens
from projects import Project
from talks import exchange

from plait import files, layout
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.tokens.llava import LlavaRenderer
from plait.verify import parity
from plait.verify.ranks import run_ranks  # noqa: F401 - loaded before ranks are forked

PICTURE, EOS, STEPS, RECORDS = 260, 2, 6, 20
"""The tokenizer has <extra_0> ... <extra_2> at 259 to 261, and its EOS pads."""
RUN = {
    "recipe": "llava", "model": "LLaVA", "mixture": "seen", "stage": 2, "micro_batch_size": 2,
    "global_batch_size": 4, "train_iters": STEPS, "save_interval": STEPS, "lr": 1e-2, "params_dtype": "fp32",
}  # fmt: skip
PLAN = {
    "datasets": {
        "own": {
            "source": {"kind": "chat-jsonl", "path": "own/chats.jsonl"},
            "energon": {"samples_per_shard": 2},
        }
    },
    "tokenizers": {"own": {"kind": "folder", "path": "own/tokenizer"}},
    "formats": {
        "sight": {"tokenizer": "own", "template": "llava", "instruction": "keep", "picture_tokens": 16}
    },
    "mixtures": {"seen": {"format": "sight", "decoder_seq_length": 96, "datasets": ["own"]}},
    "raw_hf": {
        "LM": {"kind": "init", "tokenizer": "own", "initializer_range": 0.1},
        "tower": {"kind": "init_tower", "initializer_range": 0.1},
        "LLaVA": {
            "kind": "llava", "base": "LM", "vision": "tower", "tokenizer": "own",
            "image_token_id": PICTURE, "pad_token_id": EOS,
        },
    },
    "models": {},
    "runs": {"own": RUN},
}  # fmt: skip
EXPORT = f"data/ckpts/own/hf/model_iter_{STEPS}"


def record(number):
    sample = exchange(number)
    url = "data:image/jpeg;base64," + base64.b64encode(sample.pictures[0]).decode()
    question, answer = sample.messages[0].parts[1].text, sample.messages[1].parts[0].text
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": sample.id, "messages": turns}


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a project that has trained and exported it; real jobs all the way."""
    project = Project.make(tmp_path_factory.mktemp("other") / "project")
    (project.folder / "config/config.yaml").write_text(json.dumps(PLAN))
    tokenizer_folder(project.folder / "own/tokenizer", more=3)
    lines = [json.dumps(record(number)) + "\n" for number in range(RECORDS)]
    (project.folder / "own/chats.jsonl").write_text("".join(lines))
    done = project.snakemake("--cores", "2", EXPORT, timeout=560)
    assert done.code == 0, done.text
    before = Path.cwd()
    os.chdir(project.folder)
    yield project.folder
    os.chdir(before)


def test_every_stage_takes_the_ids_of_the_models_config(made):
    """Its own <image> and <pad> the tokenizer has not; nothing was extended by them."""
    from transformers import AutoProcessor

    config, generation = (
        files.read_json(Path(EXPORT, name)) for name in ("config.json", "generation_config.json")
    )
    assert (config["image_token_index"], config["pad_token_id"]) == (PICTURE, EOS)
    assert (generation["suppress_tokens"], generation["pad_token_id"]) == ([PICTURE], EOS)
    processor = AutoProcessor.from_pretrained(EXPORT)
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (PICTURE, EOS)
    assert "<extra_1>" in Path(EXPORT, "chat_template.jinja").read_text()
    assert not {"<image>", "<pad>"} & processor.tokenizer.get_vocab().keys()
    for proof in Path("data/verify").rglob("parity.json"):
        cases = {row["case"]: row for row in files.read_json(proof)["logits"]}
        assert {"one picture", "several pictures"} <= cases.keys()


def test_answers_learn_to_end_where_eos_pads(made):
    """Every answer and its EOS is a loss token, counted once by the analysis and once by the trainer."""
    rows = [json.loads(line) for line in Path("data/ckpts/own/metrics.jsonl").read_text().splitlines()]
    lengths = {len(f" it is {number}") + 1 for number in range(RECORDS)}
    assert all(min(lengths) <= row["loss tokens"] / 4 <= max(lengths) for row in rows)
    assert rows[-1]["lm loss"] < rows[0]["lm loss"]


def test_the_trainer_writes_what_the_export_writes(made):
    from transformers import AutoModelForImageTextToText

    from plait.report.answers import Model

    _, loading = AutoModelForImageTextToText.from_pretrained(EXPORT, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    sample = exchange(7)
    Path("picture.jpg").write_bytes(sample.pictures[0])
    served = Model(Path(EXPORT)).ask("what is 7?", "picture.jpg", max_new_tokens=8)
    renderer = LlavaRenderer(Path("data/tokenizers/own"), PLAN["formats"]["sight"], PICTURE)
    iteration = Path(f"data/ckpts/own/iter_{STEPS:07d}")
    ids = [token.id for token in served.tokens]
    grid = Grid(1, 1)
    trained = parity.Trained(iteration, Spec.of(iteration, layout.HF_CONFIG), grid)
    written = trained_tokens(iteration, trained, grid, renderer, [(sample, ids)])
    assert written == [ids]
    assert torch.isfinite(torch.tensor([token.probability for token in served.tokens])).all()
