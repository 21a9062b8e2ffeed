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
    "no_loss": "reject",
}  # fmt: skip
LLAVA = {"template": "llava", "instruction": "keep", "language": "en", "picture_tokens": 9}
STEPS = 24
RUN = {
    "recipe": "chat", "model": "m", "mixture": "x", "train_iters": STEPS, "save_interval": STEPS,
    "global_batch_size": 12, "lr": 1e-2, "lr_warmup_iters": 2, "params_dtype": "fp32", "hidden_dropout": 0.1,
}  # fmt: skip
PATCH = 4
"""Side of a patch of the makers' SOLO."""
SPLIT = {"num_layers_in_first_pipeline_stage": None, "num_layers_in_last_pipeline_stage": None}


def saved(step, run="r"):
    """The checkpoint of an iteration."""
    return f"data/ckpts/{run}/iter_{step:07d}"


TARGET = saved(STEPS)
NOISE = {"iteration-time", "data-time", "tokens/s", "TFLOP/s", "MFU", "memory GB"}
"""What a row says of the machine, not of the run."""


@dataclass
class Place:
    """A project folder, and the run in it."""

    root: Path
    settings: dict
    start: str
    around: dict = field(default_factory=lambda: {"peak_tflops": 1.0})
    run: str = "r"
    analysis: str = "data/analysis/x"

    def words(self, start=("-m", "plait.cli.main"), *, after=0, to=STEPS, asked=None, **around):
        keys = Around(**self.around | around).model_dump(mode="json")
        keys |= {"asked": {"until": to} | (asked or {})}
        begin = saved(after, self.run) if after else self.start
        return [
            sys.executable, *start, "train", begin, self.analysis,
            f"data/ckpts/{self.run}/schedule.json", saved(to, self.run),
            "--settings", json.dumps(self.settings), "--around", json.dumps(keys),
        ]  # fmt: skip

    def begin(self, *, env=None, **what):
        """Start `plait train` in a process group of its own."""
        return subprocess.Popen(
            self.words(**what),
            cwd=self.root, env={**os.environ, **(env or {})}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def train(self, *, code=0, **what):
        """Run it to its end; what it said."""
        process = self.begin(**what)
        said, _ = process.communicate(timeout=250)
        assert process.returncode == code, said
        return said

    def copy(self, root, *, every=None):
        """The same project, untrained, with a copy of nothing but the schedule; it may save more often."""
        (root / "data/ckpts/r").mkdir(parents=True)
        schedule = files.read_json(self.ckpts / "schedule.json")
        schedule |= {"save_interval": every or schedule["save_interval"]}
        (root / "data/ckpts/r/schedule.json").write_text(json.dumps(schedule))
        for name in ("models", "analysis", "megatron_format", "energon", "tokenizers"):
            (root / "data" / name).symlink_to(self.root / "data" / name)
        return Place(root, self.settings, self.start, self.around)

    @property
    def ckpts(self):
        return self.root / "data/ckpts" / self.run

    @property
    def states(self):
        return sorted(path.name for path in (self.ckpts / ".state").glob("iter_*"))

    def rows(self):
        path = self.ckpts / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def result(self, step=STEPS):
        """What the run has made: every file's digest, and its rows but for the machine's figures."""
        rows = [{key: value for key, value in row.items() if key not in NOISE} for row in self.rows()]
        return files.check_manifest(self.root / saved(step, self.run))["files"], rows

    def after(self, run, step, *, steps, **keys):
        """A run that starts from an iteration of this one, untrained."""
        folder = self.root / "data/ckpts" / run
        folder.mkdir()
        (folder / "schedule.json").write_text(json.dumps({"train_iters": steps, "save_interval": steps}))
        settings = self.settings | {"start_run": self.run, "start_iteration": step} | keys
        return Place(self.root, settings, saved(step, self.run), self.around, run)


def project(root, **keys):
    """The folder, with the schedule and the settings of a run; data and model are missing."""
    run = Run(**RUN | keys).model_dump(mode="json", exclude={"exports", "generate", *Around.model_fields})
    (root / "data/models/sharded").mkdir(parents=True)
    for name in ("analysis", "megatron_format", "energon", "tokenizers", "ckpts/r"):
        (root / "data" / name).mkdir(parents=True)
    steps = keys.get("train_iters", STEPS)
    schedule = {"train_iters": steps, "save_interval": steps}
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
    maker = Maker(root / "made")
    records = [
        {"messages": [{"role": "assistant", "content": f"{n} and {n * n} " * (n % 5 + 1)}]} for n in range(60)
    ]
    lines = [json.dumps(record).encode() for record in records]
    return packs(root, maker, model(maker), maker.plain, lines, **keys)


def patched(root, **keys):
    """A run of SOLO over packed pictures and text."""
    maker = Maker(root / "made")
    lines = [exchange(n).to_line() for n in range(60)]
    return packs(root, maker, maker.solo(), maker.vision, lines, recipe="solo", **keys)


def packs(root, maker, hf, tokenizer, lines, limit=64, **keys):
    """A run over packed records; ``limit`` is the tokens of a pack."""
    place, grid = project(root, **keys)
    (root / place.start).symlink_to(maker.shards(hf, grid.tp, grid.pp))
    chats = root / "chats.jsonl"
    chats.write_bytes(b"\n".join(lines) + b"\n")
    shard = f"data/megatron_format/f_d_pack{limit}/shard_00000"
    (root / shard).mkdir(parents=True)
    form = FORM | ({"patch_size": PATCH} if keys.get("recipe") == "solo" else {})
    facts = build.build(root / shard, tokenizer, [chats], form, limit)
    files.write_manifest(root / shard, kind="indexed", settings={}, facts=facts)
    folder = analysed(place, {"sources": [{"prefix": shard, "weight": 1.0}]})
    files.write_manifest(folder, kind="analysis", settings={}, facts={})
    return place


def pictured(root, *, form=LLAVA, model=Maker.llava, **keys):
    """A run over pictures, read by energon; ``model`` makes what it trains."""
    keys = {"recipe": "llava", "shuffle_buffer_size": 8, "max_samples_per_sequence": 4} | keys
    place, grid = project(root, **keys)
    maker = Maker(root / "made")
    (root / place.start).symlink_to(maker.shards(model(maker), grid.tp, grid.pp))
    (root / "data/tokenizers/image").symlink_to(maker.image)
    dataset = root / "data/energon/d"
    dataset.mkdir()
    energon.build(dataset, (exchange(n) for n in range(40)), KEYS)
    blended(place, form)
    return place


def blended(place, form, name="x", sequence=96):
    """A mixture of the pictures in a format."""
    mixture = {
        "tokenizer": "data/tokenizers/image",
        "image_token_id": 259,
        "format": form,
        "decoder_seq_length": sequence,
        "sources": [],
    }
    folder = analysed(place, mixture, name)
    blend = energon.blend({str(place.root / "data/energon/d"): 1.0}, relative_to=folder)
    (folder / "metadataset.yaml").write_text(yaml.safe_dump(blend))
    files.write_manifest(folder, kind="analysis", settings={}, facts={})


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
