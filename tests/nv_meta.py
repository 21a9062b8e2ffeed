"""What ``energon prepare`` makes of the same tars, and the comparison with ours, file by file."""

import io
import json
import re
import shutil
import sqlite3
import warnings
from contextlib import redirect_stdout
from itertools import chain

import yaml

LEDGERS = ("rejects.jsonl", "samples.jsonl")
"""Files of ours that energon knows nothing of."""


def by_energon(folder, settings, target):
    """The tars of a folder, prepared by energon's own command in another one."""
    from megatron.energon.cli.main import main

    for path in folder.rglob("*.tar"):
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.relative_to(folder))
    chosen = ["--split-ratio", ",".join(map(str, settings["split"]))]
    if settings["split_parts"]:
        pairs = [f"{part}:{pattern}" for part, pattern in settings["split_parts"].items()]
        chosen = [*chain(*(("--split-parts", pair) for pair in pairs))]
    excluded = ["--exclude", settings["exclude"]] if settings["exclude"] else []
    described = yaml.safe_load((folder / ".nv-meta/dataset.yaml").read_text())
    kind = described.get("sample_type", described)["__class__"]
    fields = ["--field-map", json.dumps(described["field_map"])] if "field_map" in described else []
    words = ["prepare", str(target), "--non-interactive", "--no-progress", "--num-workers", "1"]
    with redirect_stdout(io.StringIO()):
        main.main([*words, "--sample-type", kind, *fields, *chosen, *excluded], standalone_mode=False)


def files_of(folder):
    """Every file, by name."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in LEDGERS
    }


def told(path):
    """All of an index: what its tables and indexes are called and made of, and its rows in their order."""
    with sqlite3.connect(path) as known:
        found = known.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        made = [(*names, re.sub(r"\s+", "", sql or "")) for *names, sql in found]
        rows = {
            name: known.execute(f"SELECT * FROM {name} ORDER BY rowid").fetchall()
            for name in ("samples", "sample_parts")
        }
    return made, rows


def compare(folder, target):
    """Bytes of every file; the index by all that stands in it, uuids by their form."""
    ours, theirs = files_of(folder), files_of(target)
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if name.endswith("index.sqlite"):
            assert told(path) == told(theirs[name])
        elif name.endswith("index.uuid"):
            assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", path.read_text())
            assert path.read_text() != theirs[name].read_text()
        else:
            assert path.read_bytes() == theirs[name].read_bytes(), name


def by_webdataset(folder):
    """Keys of all samples of all tars, as webdataset reads them."""
    from webdataset import WebDataset

    tars = sorted(map(str, folder.rglob("*.tar")))
    return [sample["__key__"] for sample in WebDataset(tars, shardshuffle=False)]


def through_energon(folder, part="train"):
    """Keys of all samples of a part, as energon reads them."""
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.errors import reraise_exception

    from plait.data.reader import Conversations

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    more = dict.fromkeys(("batch_size", "shuffle_buffer_size", "max_samples_per_sequence"))
    dataset = get_train_dataset(
        folder, split_part=part, worker_config=workers, task_encoder=Conversations(), repeat=False, **more
    )
    with warnings.catch_warnings(action="ignore"):
        return [sample.id for sample in get_loader(dataset)]
