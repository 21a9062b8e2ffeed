"""Stages of data need the memory of a few records, however many there are."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from folders import tokenizer_folder
from PIL import Image
from talks import noise
from tokens.tokenizer_folders import tekken

from plait.tokens import encode

SIZES = 1_000, 16_000
PICTURES = 10
"""Of a record: its line has about 30 kB, so all lines of the larger source are more than MOST."""
GROWN, MOST = 20, 300
"""MB that a stage may need more of the larger source, and in all."""
SMALL = 100_000, 200_000
"""Records of a few words."""
LOWER = {"index": "plait.tokens.build.WINDOW=40", "analyse": "plait.data.alike.AT_ONCE=20000"}
"""What a stage takes at once, where it is so much in earnest that these would be one."""
A_RECORD = {"index": 80, "analyse": 80, "energon": 40, "analyse energon": 80}
"""Bytes that a stage may need more for each of them."""
TOKENIZERS = {
    "base": {"kind": "package", "package": "mistral_common", "file": "data/tokenizer.model.v1"},
    "solo": {"kind": "extend", "base": "base", "add": ["vision", "chatml"]},
}
FORMATS = {"solo": {"tokenizer": "solo", "template": "chatml"}}
PEAK = """
import gc, importlib, sys
from plait.cli.main import FEWEST, main
gc.set_threshold(FEWEST)
if lower := sys.argv.pop():
    place, _, value = lower.partition("=")
    module, _, name = place.rpartition(".")
    assert getattr(importlib.import_module(module), name) > int(value)
    setattr(sys.modules[module], name, int(value))
code = main(sys.argv[1:])
most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(int(most) * 1024)
sys.exit(code)
"""


def peak(*words, lower=""):
    """MB that a stage had at most, in a process of its own: all that was resident, pages of files too."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words, "--config", "config.yaml", lower],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(done.stdout.split()[-1]) / 1e6


def source(path, records):
    """Conversations about pictures, in lines of one length."""
    urls = [f"data:image/png;base64,{base64.b64encode(noise(n).encoded).decode()}" for n in range(PICTURES)]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    turns = [
        {"role": "user", "content": [*shown, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "noise " * 1000},
    ]
    with path.open("w") as out:
        for number in range(records):
            out.write(json.dumps({"id": f"s-{number}", "messages": turns}) + "\n")
    return path.stat().st_size / 1e6


@pytest.mark.long
def test_memory_does_not_grow_with_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {f"d{size}": size for size in SIZES}
    datasets = {
        name: {
            "source": {"kind": "chat-jsonl", "path": f"{name}.jsonl"},
            "energon": {"samples_per_shard": 100},
        }
        for name in names
    }
    config = {"datasets": datasets, "tokenizers": TOKENIZERS, "formats": FORMATS}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    base, tokenizer = (f"data/tokenizers/{name}" for name in TOKENIZERS)
    peak("tokenizer", base)
    peak("tokenizer", base, tokenizer)
    held, peaks = {}, {}
    for name, size in names.items():
        held[size] = source(Path(f"{name}.jsonl"), size)
        chat = f"data/processed/{name}/shard_00000.jsonl.gz"
        peaks[size] = {
            "raw": peak("raw", f"data/raw/{name}"),
            "chat": peak("chat", f"data/raw/{name}", chat),
            "energon": peak("energon", chat, f"data/energon/{name}"),
            "index": peak("index", tokenizer, chat, f"data/megatron_format/solo_{name}_pack4096/shard_00000"),
        }
    few, many = (peaks[size] for size in SIZES)
    assert held[SIZES[1]] > MOST
    assert max(many.values()) < MOST, peaks
    assert all(many[stage] < few[stage] + GROWN for stage in few), peaks


@pytest.mark.long
def test_a_large_vocabulary_fits_though_both_libraries_read_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tekken(Path("tekken"))
    config = {
        "datasets": {"d": {"source": {"kind": "chat-jsonl", "path": "d.jsonl"}}},
        "tokenizers": {"t": {"kind": "folder", "path": "tekken"}},
        "formats": {"p": {"tokenizer": "t", "template": "pretrain"}},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    newer = chr(int(encode.NEWER[""].split()[0], 16))
    with Path("d.jsonl").open("w") as out:
        for number in range(4000):
            text = f"{number} noise " * 300 + newer * (number == 3000)
            turns = [{"role": "assistant", "content": text}]
            out.write(json.dumps({"id": f"s-{number}", "messages": turns}) + "\n")
    tokenizer, chat = "data/tokenizers/t", "data/processed/d/shard_00000.jsonl.gz"
    peak("tokenizer", tokenizer)
    peak("raw", "data/raw/d")
    peak("chat", "data/raw/d", chat)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as the workflow starts it

    found = peak("index", tokenizer, chat, "data/megatron_format/p_d_pack4096/shard_00000")
    assert found < MOST


def talk(path, records):
    """Conversations of a few words, each another one."""
    draw = np.random.default_rng(records)
    with path.open("w") as out:
        for number, words in enumerate(draw.integers(0, 500, (records, 12)).tolist()):
            asked, *said = (" ".join(f"word{word}" for word in some) for some in (words[:4], words[4:]))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said[0]}]
            out.write(json.dumps({"id": f"s-{number}", "messages": turns}) + "\n")


@pytest.mark.long
def test_a_small_record_takes_few_bytes_in_each_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = "data/tokenizers/byte"
    tokenizer_folder(Path(tokenizer), vision=True, chatml=True, image=True)
    names = {f"d{size}": size for size in SMALL}
    sources = {name: {"kind": "chat-jsonl", "path": f"{name}.jsonl"} for name in names}
    packs = {f"p-{name}": {"format": "packs", "pack": 512, "datasets": [name]} for name in names}
    samples = {
        f"s-{name}": {"format": "samples", "decoder_seq_length": 512, "datasets": [name]} for name in names
    }
    config = {
        "datasets": {name: {"source": one, "energon": {"split": [1, 0, 0]}} for name, one in sources.items()},
        "tokenizers": {"byte": {"kind": "folder", "path": tokenizer}},
        "formats": {
            "packs": {"tokenizer": "byte", "template": "chatml"},
            "samples": {"tokenizer": "byte", "template": "llava", "picture_tokens": 4},
        },
        "mixtures": {**packs, **samples},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    peaks = {}
    for name, size in names.items():
        talk(Path(f"{name}.jsonl"), size)
        chat = f"data/processed/{name}/shard_00000.jsonl.gz"
        shard, dataset = f"data/megatron_format/packs_{name}_pack512/shard_00000", f"data/energon/{name}"
        peak("raw", f"data/raw/{name}")
        peak("chat", f"data/raw/{name}", chat)
        peaks[size] = {
            "index": peak("index", tokenizer, chat, shard, lower=LOWER["index"]),
            "analyse": peak("analyse", shard, f"data/analysis/p-{name}", lower=LOWER["analyse"]),
            "energon": peak("energon", chat, dataset),
            "analyse energon": peak(
                "analyse", tokenizer, dataset, f"data/analysis/s-{name}", lower=LOWER["analyse"]
            ),
        }
    few, many = (peaks[size] for size in SMALL)
    grown = {stage: (many[stage] - few[stage]) * 1e6 / (SMALL[1] - SMALL[0]) for stage in few}

    assert max(many.values()) < MOST, peaks
    assert all(grown[stage] < A_RECORD[stage] for stage in few), (grown, peaks)


def photograph(side):
    """A large JPEG file as a data URL: waves of colour, and noise as a camera's."""
    draw, place = np.random.default_rng(side), np.linspace(0, 40, side)
    waves = 100 + 60 * np.sin(place)[:, None, None] * np.cos(place[:, None] + np.arange(3))
    pixels = np.clip(waves + draw.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


@pytest.mark.long
def test_memory_does_not_grow_with_photographs_that_are_resized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {"type": "image_url", "image_url": {"url": photograph(2048)}}
    peaks, smaller = [], {"rule": "longest_side", "max_side": 1024}
    for name, records in (("few", 6), ("many", 120)):
        source = {"kind": "chat-jsonl", "path": f"{name}.jsonl"}
        Path("config.yaml").write_text(
            yaml.safe_dump({"datasets": {name: {"source": source, "pictures": smaller}}})
        )
        with Path(f"{name}.jsonl").open("w") as out:
            for number in range(records):
                turns = [{"role": "user", "content": [shown]}, {"role": "assistant", "content": "waves"}]
                out.write(json.dumps({"id": f"p-{number}", "messages": turns}) + "\n")
        peak("raw", f"data/raw/{name}")
        peaks.append(peak("chat", f"data/raw/{name}", f"data/processed/{name}/shard_00000.jsonl.gz"))

    assert peaks[1] < min(peaks[0] + GROWN, MOST), peaks
