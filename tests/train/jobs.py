"""Folders in which the tests run `plait train` itself: a tiny model, packed or LLaVA data, a schedule."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from makers import Maker
from talks import KEYS, exchange

from plait import files
from plait.config.run import Around, Run
from plait.data import energon
from plait.parallel.grid import Grid
from plait.tokens import build

FORM = {
    "tokenizer": "plain", "template": "pretrain", "packing": "best_fit", "overlong": "split",
    "pictures": "encoded", "patch_size": 32, "max_resolution": 1024, "reject_limit": 0.5,
}  # fmt: skip
LLAVA = {"template": "llava", "instruction": "keep", "language": "en", "picture_tokens": 9}
STEPS = 24
RUN = {
    "recipe": "chat", "model": "m", "mixture": "x", "train_iters": STEPS, "save_interval": STEPS,
    "global_batch_size": 12, "lr": 1e-2, "lr_warmup_iters": 2, "params_dtype": "fp32", "hidden_dropout": 0.1,
}  # fmt: skip
SPLIT = {"num_layers_in_first_pipeline_stage": None, "num_layers_in_last_pipeline_stage": None}
TARGET = f"data/ckpts/r/iter_{STEPS:07d}"
NOISE = {"iteration-time", "data-time", "tokens/s", "TFLOP/s", "MFU", "memory GB"}
"""What a row says of the machine, not of the run."""


@dataclass
class Place:
    """A project folder, and the run in it."""

    root: Path
    settings: dict
    start: str
    around: dict = field(default_factory=lambda: {"peak_tflops": 1.0})

    def words(self, start=("-m", "plait.cli.main"), **around):
        keys = Around(**self.around | around).model_dump(mode="json")
        return [
            sys.executable, *start, "train", self.start, "data/analysis/x",
            "data/ckpts/r/schedule.json", TARGET,
            "--settings", json.dumps(self.settings), "--around", json.dumps(keys),
        ]  # fmt: skip

    def begin(self, *, env=None, **around):
        """Start `plait train` in a process group of its own."""
        return subprocess.Popen(
            self.words(**around),
            cwd=self.root, env={**os.environ, **(env or {})}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def train(self, **around):
        """Run it to its end; what it said."""
        process = self.begin(**around)
        said, _ = process.communicate(timeout=250)
        assert process.returncode == 0, said
        return said

    def copy(self, root):
        """The same project, untrained, with a copy of nothing but the schedule."""
        (root / "data/ckpts/r").mkdir(parents=True)
        (root / "data/ckpts/r/schedule.json").write_bytes((self.ckpts / "schedule.json").read_bytes())
        for name in ("models", "analysis", "megatron_format", "energon", "tokenizers"):
            (root / "data" / name).symlink_to(self.root / "data" / name)
        return Place(root, self.settings, self.start, self.around)

    @property
    def ckpts(self):
        return self.root / "data/ckpts/r"

    @property
    def states(self):
        return sorted(path.name for path in (self.ckpts / ".state").glob("iter_*"))

    def rows(self):
        path = self.ckpts / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def result(self):
        """What the run has made: every file's digest, and its rows but for the machine's figures."""
        rows = [{key: value for key, value in row.items() if key not in NOISE} for row in self.rows()]
        return files.check_manifest(self.root / TARGET)["files"], rows


def project(root, **keys):
    """The folder, with the schedule and the settings of a run; data and model are missing."""
    run = Run(**RUN | keys).model_dump(mode="json", exclude={"exports", "generate", *Around.model_fields})
    (root / "data/models/sharded").mkdir(parents=True)
    for name in ("analysis", "megatron_format", "energon", "tokenizers", "ckpts/r"):
        (root / "data" / name).mkdir(parents=True)
    schedule = {"train_iters": STEPS, "save_interval": STEPS}
    (root / "data/ckpts/r/schedule.json").write_text(json.dumps(schedule))
    grid = Grid(run["tensor_model_parallel_size"], run["pipeline_model_parallel_size"])
    start = f"data/models/sharded/m-megatron-tp{grid.tp}-pp{grid.pp}"
    return Place(root, run | SPLIT, start), grid


def analysed(place, mixture, name="x"):
    folder = place.root / "data/analysis" / name
    folder.mkdir()
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    return folder


def packed(root, *, model=Maker.hf, **keys):
    """A run over packed text; ``model`` makes what it trains."""
    place, grid = project(root, **keys)
    maker = Maker(root / "made")
    (root / place.start).symlink_to(maker.shards(model(maker), grid.tp, grid.pp))
    chats = root / "chats.jsonl"
    records = [
        {"messages": [{"role": "assistant", "content": f"{n} and {n * n} " * (n % 5 + 1)}]} for n in range(60)
    ]
    chats.write_text("".join(json.dumps(record) + "\n" for record in records))
    shard = "data/megatron_format/f_d_pack64/shard_00000"
    (root / shard).mkdir(parents=True)
    facts = build.build(root / shard, maker.plain, [chats], FORM, 64)
    files.write_manifest(root / shard, kind="indexed", settings={}, facts=facts)
    folder = analysed(place, {"sources": [{"prefix": shard, "weight": 1.0}]})
    files.write_manifest(folder, kind="analysis", settings={}, facts={})
    return place


def pictured(root, **keys):
    """A run over pictures, read by energon."""
    place, grid = project(root, recipe="llava", shuffle_buffer_size=8, max_samples_per_sequence=4, **keys)
    maker = Maker(root / "made")
    (root / place.start).symlink_to(maker.shards(maker.llava(), grid.tp, grid.pp))
    (root / "data/tokenizers/image").symlink_to(maker.image)
    dataset = root / "data/energon/d"
    dataset.mkdir()
    energon.build(dataset, (exchange(n) for n in range(40)), KEYS)
    mixture = {
        "tokenizer": "data/tokenizers/image",
        "image_token_id": 259,
        "format": LLAVA,
        "decoder_seq_length": 96,
        "sources": [],
    }
    folder = analysed(place, mixture)
    blend = energon.blend({str(dataset): 1.0}, relative_to=folder)
    (folder / "metadataset.yaml").write_text(yaml.safe_dump(blend))
    files.write_manifest(folder, kind="analysis", settings={}, facts={})
    return place


def wait_for(what, process, *, seconds=120, pause=0.01):
    """Until something is so, while a process lives."""
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(pause)


def family(pid):
    """A process and all below it."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


__all__ = ["STEPS", "TARGET", "family", "kill", "packed", "pictured", "wait_for"]
