"""How long training waits for a save, beside `torch.save` of the same state to the same disk.

A Llama of 57M parameters in layers is trained in bf16, with masters and moments in fp32, by the rank that
`plait train` starts. Every other iteration a state is saved; the step after it has the writer beside it, the
one after that has not. Between them nothing is written, and torch saves what the state holds. The first save,
which starts the writer and finds memory, does not count.
"""

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.bench.harness import KB, Figure, Told
from tests.bench.rows.training import inside, make, trains

EVERY, ITERATIONS = 2, 12
LEAST = 1 / 0.3


class Watch:
    """Seconds of what a trainer does."""

    def __init__(self, trainer, saves, folder):
        self.blocked, self.peers, self.steps = [], [], {True: [], False: []}
        self.saves, self.beside, self.memory, self.folder = None, False, 0.0, folder
        row, keep, save = trainer._row, trainer._keep, saves.save
        trainer._row = lambda one: self.row(one, row)
        trainer._keep = lambda one, *args, **keys: self.keep(partial(keep, one, *args, **keys), **keys)
        saves.save = lambda one, *args, **keys: self.save(one, partial(save, one, *args, **keys))

    def save(self, saves, work):
        self.saves = saves
        work()

    def keep(self, work, *, goes_on):
        os.sync()
        seconds = timed(work)
        if goes_on:
            self.blocked.append(seconds)
            self.beside = True

    def row(self, trainer, row):
        began = time.perf_counter()
        found = row(trainer)
        self.steps[self.beside].append(time.perf_counter() - began)
        if self.beside:
            self.beside = False
            writer = self.saves._open.writer
            writer.hears()
            self.memory = of_process(writer._process.pid)
            os.sync()
            self.peers.append(timed(partial(torch_saves, trainer.state, self.folder / "state.pt")))
        return found


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def torch_saves(state, path):
    """All that a checkpoint holds, by names of this rank."""
    import torch

    model = {name: one.detach() for name, one in state.model[0].state_dict().items() if one is not None}
    torch.save({"model": model, "optimizer": state.optimizer.state_dict()}, path)


def of_process(pid):
    """MB that a process had at most, without what it shares with its rank."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line}
    return (int(found["RssAnon"]) + int(found["RssFile"])) * KB


def blocked(seed):
    """torch.save's time to that for which training waits."""
    from plait.train import loop, saves

    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_ROOT")) as temporary:
        folder = Path(temporary)
        make(folder, seed, shape="60m", dtype="bf16", iterations=ITERATIONS)
        watch = Watch(loop.Trainer, saves.Saves, folder)
        with inside(folder) as known:
            trains(known, non_persistent_save_interval=EVERY)
        size = (folder / "state.pt").stat().st_size / 1e6
    ours, peer = statistics.median(watch.blocked[1:]), statistics.median(watch.peers)
    slowed = statistics.median(watch.steps[True]) / statistics.median(watch.steps[False][1:]) - 1
    return Told(
        peer / ours,
        f"{ours * 1e3:.0f} ms of {peer * 1e3:.0f} ms for {size:.0f} MB, in {len(watch.blocked) - 1} saves; "
        f"the first {watch.blocked[0]:.2f} s; steps beside the writer slowed by {slowed:.1%}; the writer has "
        f"{watch.memory:.0f} MB of its own",
    )


ROWS = [Figure("save-blocked", LEAST, blocked)]
