"""``plait preflight``: what can be known of a run before an hour of a GPU is spent on it."""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from plait.cli.common import Subparsers, add_stage
from plait.errors import DataError, PlaitError

if TYPE_CHECKING:
    from plait.config import Plan
    from plait.models.specs import Spec
    from plait.preflight.ranks import Rank
    from plait.train.job import Job

WIDTH = 16


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "preflight",
        "check a run before it starts: its launch, every rank, memory and inputs, and one tiny step",
        "chat-tiny --device-memory 80",
    )
    parser.add_argument("name", metavar="RUN", help="a run of the config")
    parser.add_argument("--config", default="config/config.yaml", help="config file (default: %(default)s)")
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GB",
        help="memory of a GPU, in 10^9 bytes; default: of this one",
    )
    parser.add_argument("--apptainer", action="store_true", help="the launch as under --sdm apptainer")
    parser.add_argument(
        "--processes", type=int, default=8, help="processes of the tiny step at most (default: %(default)s)"
    )
    parser.add_argument("--no-step", action="store_true", help="leave the tiny step out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Say everything that is found, then fail if anything does not fit.

    Raises:
        PlaitError: what does not fit.
    """
    warnings.filterwarnings("ignore", module="megatron")
    logging.getLogger("plait").setLevel(logging.WARNING)  # what stages say of small models is of no use
    from plait.config import Plan
    from plait.config.model import load_file
    from plait.models.specs import Spec
    from plait.preflight import inputs, launched, shape
    from plait.preflight.checks import check_data

    plan = Plan(load_file(args.config))
    plan.check_grid(plan.sharded(args.name))
    job = launched.planned(plan, args.name)
    _say(f"run {args.name}", launched.trained(plan, args.name, job))
    _say("launch", launched.launched(plan, job, in_image=args.apptainer))
    found = inputs.inputs_of(plan, args.name)
    _say("inputs", inputs.summary(found))
    model = shape.config_of_run(plan, args.name)
    spec = Spec.from_config(model, where=f"the config.json of {plan.run(args.name).model}")
    check_data(plan, args.name, spec)
    checks: list[Callable[[], None]] = [lambda: _ranks(args, plan, job, spec), lambda: _all_there(found)]
    if not args.no_step:
        checks.insert(1, lambda: _step(args, plan, job, model))
    failed = [error for error in map(_failure, checks) if error]
    for error in failed[1:]:
        _say("also", [("", str(error))])
    if failed:
        raise failed[0]


def _failure(check: Callable[[], None]) -> PlaitError | None:
    """What does not fit; the checks after it are made nevertheless."""
    try:
        check()
    except PlaitError as error:
        return error
    return None


def _ranks(args: argparse.Namespace, plan: "Plan", job: "Job", spec: "Spec") -> None:
    """Every rank's parameters, and the memory of the fullest."""
    import torch

    from plait.preflight import memory, ranks
    from plait.preflight.checks import check_memory

    found = ranks.checked(spec, job.grid, job.settings)
    frozen = ", ".join(job.settings["freeze"]) or "nothing"
    rows = [
        ("ranks", f"{_counted(found)} of a {job.grid}: names and shapes are those that are cut for them"),
        ("parameters", f"{ranks.parameters(spec):,}, each held once; frozen: {frozen}"),
    ]
    _say("model", rows)
    copies = job.settings["data_parallel_size"]
    shape = memory.Run(job.settings, job.grid, copies, plan.sequence(args.name))
    rank, needed = memory.worst(found, spec, shape)
    device = args.device_memory and args.device_memory * memory.GIGA
    if device is None and torch.cuda.is_available():
        device = float(torch.cuda.get_device_properties(0).total_memory)
    of = f" of {device / memory.GIGA:.1f}" if device else " (--device-memory compares it with a GPU's)"
    total = sum(needed.values())
    rows = [(name, f"{value / memory.GIGA:10.3f}") for name, value in needed.items()]
    _say(f"memory in GB of the fullest rank: tp {rank.tp}, pp {rank.pp}", rows)
    _say("", [("sum", f"{total / memory.GIGA:10.3f}{of}")])
    check_memory(total, device)


def _counted(found: "Sequence[Rank]") -> str:
    """How many ranks there are, and chunks where these are more."""
    places = {one.place for one in found}
    return f"{len(places)}" + (f", with {len(found)} chunks," if len(found) > len(places) else "")


def _step(args: argparse.Namespace, plan: "Plan", job: "Job", model: dict[str, Any]) -> None:
    """The tiny step, and what of the run is not in it."""
    import torch

    from plait.preflight.small import Small
    from plait.preflight.step import tiny_step

    schedule, gpu = plan.schedule_as_known(args.name), torch.cuda.is_available()
    most = min(args.processes, torch.cuda.device_count()) if gpu else args.processes
    length = schedule.train_iters if schedule else None
    small = Small.of(job, model, processes=max(1, most), length=length, gpu=gpu)
    _say(
        "tiny step",
        [("changed" if number == 0 else "", note) for number, note in enumerate(small.notes)],
    )
    done = tiny_step(plan, job, small)
    losses = " and ".join(f"{loss:.4f}" for loss in done.losses)
    said = (
        f"losses {losses}, the second from the checkpoint of the first; {done.seconds:.0f} s on {done.data}"
    )
    _say("" if small.notes else "tiny step", [("done", said)])


def _all_there(found: list[Any]) -> None:
    """Refuse a run with inputs that nobody can make.

    Raises:
        DataError: it names the first.
    """
    lacking = [one for one in found if one.state == "cannot be had"]
    if lacking:
        more = f", and {len(lacking) - 1} more inputs" if len(lacking) > 1 else ""
        raise DataError(f"{lacking[0].artifact} cannot be had{more}", hint=lacking[0].why)


def _say(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A title, and a table of two columns below it."""
    lines = [f"  {name:<{WIDTH}}{text}" for name, text in rows]
    print(*([title] if title and lines else []), *lines, sep="\n", flush=True)  # noqa: T201
