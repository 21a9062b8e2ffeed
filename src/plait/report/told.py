"""What a run says of the data that it is trained on: its log of samples, and beside it its manifests."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait import files, layout
from plait.config.schedule import skipped
from plait.errors import DataError
from plait.report import state
from plait.train import lineage
from plait.train.job import Mixed

if TYPE_CHECKING:
    from plait.train.batches import Order

TAR = ".tar/"


def of(run: layout.Run) -> dict[str, Any]:
    """The analysis that the run is trained on, its digest then, and the run's settings."""
    told = Path(run.samples) / lineage.JOB
    if told.is_file():
        return files.read_object(told)
    for folder in reversed(state.checkpoints(Path(str(run)))):
        manifest = files.read_manifest(folder)
        for path, digest in manifest["inputs"].items():
            if layout.Analysis.read(path):
                return {"analysis": path, "digest": digest, "settings": manifest["settings"]}
    raise DataError(f"{run} was not trained yet", hint="its first job writes down what it is trained on")


def is_left_out(settings: Mapping[str, Any], step: int) -> bool:
    """Whether the run's keys have a step consume its samples and train nothing."""
    return any(step in one for one in skipped(settings["skip_train_iteration_range"]))


def reached(run: layout.Run, told: Mapping[str, Any]) -> int:
    """The last step of the run on these data, by its log, a checkpoint or a state; 0 if none."""
    kept = [one for folder in (str(run), run.states, run.saved) for one in state.checkpoints(Path(folder))]
    found = [
        int(one.name.removeprefix("iter_"))
        for one in kept
        if files.read_manifest(one)["inputs"].get(told["analysis"]) == told["digest"]
    ]
    return max(lineage.last_step(Path(run.samples)), *found, 0)


def order(run: layout.Run, told: Mapping[str, Any]) -> "Order":
    """The packs that seed and step give.

    Raises:
        DataError: a shard is gone.
    """
    from plait.train.batches import Order

    shards, settings = Mixed(Path(told["analysis"])).shards, told["settings"]
    return Order(
        weights=tuple(weight for _, weight in shards),
        sizes=tuple(files.read_manifest(shard, kind="indexed")["facts"]["packs"] for shard, _ in shards),
        seed=settings["seed"],
        draws=files.read_json(run.schedule)["train_iters"] * settings["global_batch_size"],
    )


def check_unchanged(path: str, was: str | None, what: str) -> None:
    """What the numbers of a log stand for must be what it was."""
    if not Path(path).is_dir() or (was and not Path(path, layout.MANIFEST).is_file()):
        raise DataError(f"{path} is gone; {what} was made from it", hint="ask for it again")
    if was and was != (now := files.digest_of_input(path)):
        raise DataError(
            f"{what} was made from {path} of digest {was[:12]}, it is {now[:12]} now",
            hint="bring back what it was made from",
        )


def dataset(place: str) -> Path:
    """The folder of energon's dataset that a tar is in, however deep."""
    tar = Path(place.rpartition(TAR)[0])
    return next((p for p in tar.parents if layout.Energon.read(p.as_posix())), tar.parent)
