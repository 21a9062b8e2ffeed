"""Plans of the systems that plait replaces, and of real weights: from nothing to their last checkpoint."""

import os
import re
from pathlib import Path

import pytest
import yaml

from plait.config import Plan
from plait.config.model import load_file

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).parent / "goldens" / "presets"
SUPPLY = re.compile(r"^You must supply .*$", re.MULTILINE)
TARGETS = {
    "solo-mistral-7b": "MultimodalMistral-7B-T2P1-stage3-lr5e-5-warmup200-bs128-seq32768/hf/model_iter_300",
    "codeact-llama2-7b": "Llama-2-7b-t4-p1-codeact-lr1e-5-warmup50-bs32-seq4096-ep5/hf/model_iter_3030",
    "codeact-mistral-7b": "Mistral-7b-t4-p1-codeact-lr1e-5-warmup50-bs32-seq16384-ep5/hf/model_iter_760",
    "llava-mistral-7b": (
        "finetune-mcore-llava-7B-lr-0.00015-minlr-1e-5-bs-1-gbs-256-seqlen-576-pr-bf16-tp-4-pp-1-cp-1-ac-true-"
        "do-true-sp--ti-20000-wi-200/hf/model_iter_20000"
    ),
    "llava-jp-13b": "llavajp13b-tp4-pp1-dp2-stage2/hf/model_iter_2000",
    "smollm2-135m": "smollm2-135m-pp2-chat/hf/model_iter_10",
}


def test_every_preset_is_here():
    assert {path.stem for path in (ROOT / "config/plans").glob("*.yaml")} == set(TARGETS)
    assert {path.stem for path in GOLDENS.glob("*.txt")} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_preset_plans_from_nothing_to_its_last_checkpoint(name, empty_project):
    target = f"ckpts/{TARGETS[name]}"
    done = empty_project.snakemake("-n", "--cores", "2", target, "--config", f"plan={name}")
    assert done.code == 0, done.text
    text = "\n".join([*SUPPLY.findall(done.text), *done.jobs]) + "\n"

    golden = GOLDENS / f"{name}.txt"
    if os.environ.get("REWRITE_GOLDENS"):
        golden.write_text(text)
    assert text == golden.read_text(), "the plan changed; `make goldens` rewrites it"


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_never_released_is_listed(name):
    config = load_file(ROOT / f"config/plans/{name}.yaml")
    placeholders = {
        dataset for dataset, one in config.datasets.items() if getattr(one.source, "kind", "") == "you-supply"
    }
    listed = (GOLDENS / f"{name}.txt").read_text()
    for dataset in placeholders:
        kind = config.datasets[dataset].source.as_kind
        assert re.search(
            rf"^You must supply data/raw/{re.escape(dataset)}: .*, kind {kind}\.$", listed, re.MULTILINE
        )


def test_what_was_never_released_stops_the_run(empty_project):
    done = empty_project.snakemake("--cores", "1", "data/raw/stage1", "--config", "plan=llava-jp-13b")
    assert done.code == 1
    assert "Japanese captions as tars" in done.text
    assert not (empty_project.folder / "data/raw/stage1").exists()


@pytest.mark.parametrize("name", TARGETS)
def test_the_targets_of_a_preset_are_what_its_head_tells_people_to_ask_for(name):
    text = (ROOT / f"config/plans/{name}.yaml").read_text()
    plan = Plan(load_file(ROOT / f"config/plans/{name}.yaml"))
    assert f"ckpts/{TARGETS[name]}" in text
    assert f"data/ckpts/{TARGETS[name]}" in [str(export) for export in plan.exports()]
    assert f"plan={name}" in text


def test_an_overlay_goes_over_a_preset(empty_project):
    overlay = {"runs": {TARGETS["llava-jp-13b"].partition("/")[0]: {"tensor_model_parallel_size": 2}}}
    done = empty_project.snakemake(
        "-n", "--cores", "2", f"ckpts/{TARGETS['llava-jp-13b']}", "--config", "plan=llava-jp-13b",
        config=overlay,
    )  # fmt: skip
    assert done.code == 0, done.text
    assert any("llavajp13b-megatron-tp4-pp1" in job for job in done.jobs)


def test_an_unknown_preset_is_refused_with_the_known_ones(empty_project):
    done = empty_project.snakemake("-n", "--config", "plan=nonsense")
    assert done.code == 1
    assert "there is no plan 'nonsense' in config/plans" in done.text
    assert "codeact-llama2-7b, codeact-mistral-7b, llava-jp-13b" in done.text


def test_solos_weights_are_those_of_its_scripts():
    """Stage 1 of SOLO samples by weight, stages 2 by packs; none is rounded away."""
    mixtures = yaml.safe_load((ROOT / "config/plans/solo-mistral-7b.yaml").read_text())["mixtures"]
    assert mixtures["imagenet21k_stage1"]["weights"] == {"imagenet21k": 0.7, "slimpajama_002": 0.3}
    assert min(mixtures["llavaR_stage3"]["weights"].values()) == 0.0398
