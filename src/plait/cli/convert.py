"""``plait convert``: a model from one layout to another; inside data/, a whole Megatron one is made."""

import argparse
from pathlib import Path

from plait import files, layout
from plait.cli.common import Subparsers, add_parts, add_settings, add_stage, settings
from plait.errors import LayoutError

SIZES = {
    "tp": "tensor parallel ranks of the target",
    "pp": "pipeline stages",
    "ep": "expert parallel ranks",
    "vpp": "chunks of each stage of an interleaved pipeline",
    "first": "layers of the first stage",
    "last": "layers of the last stage",
    "step": "the iteration of the source",
}


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "convert",
        "convert a model: to a whole Megatron one inside data/, from any layout to any elsewhere",
        "data/models/raw_hf/Mistral-7B-v0.1 data/models/raw/Mistral-7b-megatron\n"
        "  plait convert data/models/raw_hf/Mistral-7B-v0.1 data/models/raw/Mistral-7b-megatron --part 1/4\n"
        "  plait convert data/ckpts/RUN there/tp4 --step 100 --tp 4\n"
        "  plait convert there/tp4 there/hf --to hf --hf data/models/raw_hf/Mistral-7B-v0.1\n"
        "  plait convert data/ckpts/RUN there/tp2 --step 100 --tp 2 --optim",
    )
    parser.add_argument(
        "source", help=f"{layout.HfModel.PATTERN}; elsewhere any folder of a model or of checkpoints"
    )
    parser.add_argument(
        "target", help=f"{layout.Megatron.PATTERN}; elsewhere any folder that is not there yet"
    )
    add_settings(parser)
    add_parts(parser)
    elsewhere = parser.add_argument_group("outside data/, where no path says it")
    elsewhere.add_argument(
        "--to", choices=("classic", "torch_dist", "hf"), help="the target's layout (default: classic)"
    )
    for name, what in SIZES.items():
        elsewhere.add_argument(f"--{name}", type=int, metavar="N", help=what)
    elsewhere.add_argument(
        "--names",
        choices=("local", "te", "te-grouped"),
        help="whose names a classic target's tensors have: those of Megatron Core's own layers (default), or "
        "of Transformer Engine's, which Megatron-LM builds unless told --transformer-impl local; te-grouped "
        "is for --moe-grouped-gemm",
    )
    elsewhere.add_argument(
        "--hf",
        type=Path,
        metavar="FOLDER",
        help="the Hugging Face folder of the model: its config, tokenizer, code",
    )
    elsewhere.add_argument(
        "--optim",
        action="store_const",
        const=True,
        help="take the optimizer along: moments, fp32 masters, steps, groups of parameters, loss scale and "
        "schedule; a classic target then has the iteration's number. States of generators (Megatron-LM: "
        "--no-load-rng) and places in the data stay behind. Of distributed optimizers only those that are "
        "fully_reshardable are read",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the model and its manifest."""
    if Path(layout.inside(args.target)).parts[:1] == ("data",):
        _inside(args)
    else:
        _elsewhere(args)


def _inside(args: argparse.Namespace) -> None:
    """A stage of the plan: paths say all."""
    given = [
        f"--{name}" for name in ("to", "hf", "names", "optim", *SIZES) if getattr(args, name) is not None
    ]
    if given:
        raise LayoutError(
            f"{given[0]} was given for {args.target}, whose path says what it is",
            hint="leave it out, or name a target outside data/",
        )
    from plait.convert.folders import Conversion
    from plait.convert.split import Job

    source = Path(str(layout.HfModel.parse(args.source)))
    target = layout.Megatron.parse(args.target)
    job = Job(Conversion.of_hf(source), target, "megatron", settings(args, target))
    job.part(*args.part) if args.part else job.whole(args.join)


def _elsewhere(args: argparse.Namespace) -> None:
    """Any layout and grid to any other."""
    from plait.convert import folders
    from plait.parallel.grid import Grid

    if args.part or args.join:
        raise LayoutError(
            f"parts are made of a target inside data/, which {args.target} is not", hint="leave --part out"
        )
    target = Path(args.target)
    if target.exists():
        raise LayoutError(f"{target} stands there already", hint="name a folder that does not")
    sizes = {name: getattr(args, name) for name in SIZES if name != "step"}
    if args.optim and args.to == "hf":
        raise LayoutError(
            "--optim says nothing of a hf target: Hugging Face folders hold no optimizer",
            hint="leave it out, or name --to classic or --to torch_dist",
        )
    if args.optim and args.names not in (None, "local"):
        raise LayoutError(
            f"--names {args.names} was given with --optim, which is written by Megatron Core's own names",
            hint="leave one out, or name --to torch_dist, whose names are those of both",
        )
    given = [f"--{name}" for name in (*sizes, "names") if getattr(args, name) is not None]
    if given and args.to in ("hf", "torch_dist"):
        raise LayoutError(f"{given[0]} says nothing of a {args.to} target", hint="it is of a classic one")
    tp, pp, ep, chunks = (1 if sizes[name] is None else sizes[name] for name in ("tp", "pp", "ep", "vpp"))
    if min(ep, chunks) < 1:
        raise LayoutError(f"--ep {ep} --vpp {chunks}: sizes start at 1")
    grid = Grid(tp=tp, pp=pp, first=args.first, last=args.last)
    with files.appears_whole(target, folder=True) as folder:
        facts = folders.remake(
            Path(args.source),
            folder,
            grid,
            to=args.to or "classic",
            step=args.step,
            hf=args.hf,
            ep=ep,
            chunks=chunks,
            layers=args.names or "local",
            optim=bool(args.optim),
        )
        files.write_manifest(folder, kind="converted", settings={}, facts=facts)
    beside = f"; optimizer of iteration {facts['optimizer']['iteration']}" if args.optim else ""
    print(f"{target}: {facts['tensors']} tensors; merkle {facts['merkle']}{beside}")  # noqa: T201
