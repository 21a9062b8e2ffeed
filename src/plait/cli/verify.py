"""``plait verify``: the proof of a converted or sharded model."""

import argparse
import os
from pathlib import Path

from plait import layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.errors import LayoutError


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "verify",
        "prove a converted or sharded model against its Hugging Face folder, or a checkpoint by its export",
        "data/models/raw_hf/Mistral-tiny-chatml data/models/sharded/chat-tiny-megatron-tp1-pp2 "
        "data/verify/models/sharded/chat-tiny-megatron-tp1-pp2/parity.json",
    )
    stage.add_argument(
        "reference",
        help="the Hugging Face folder: source of a converted model, export of a checkpoint; or alone, any "
        "artifact, or a file of one, which is compared with its plait.json, tensors.json or ledger",
    )
    stage.add_argument("artifact", nargs="?", help="the Megatron model")
    stage.add_argument("proof", nargs="?", help="the proof to write")
    add_settings(stage)
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prove it, in as many processes as its grid has ranks; alone it is compared with its manifest."""
    if args.artifact is None:
        from plait.convert.compare import checked

        print(f"{args.reference}: {checked(Path(args.reference))}")  # noqa: T201
        return
    if args.proof is None:
        raise LayoutError(
            f"the proof of {args.artifact} has no place", hint="give its path as the third word"
        )
    artifact = layout.parse(args.artifact)
    if not isinstance(artifact, layout.Megatron | layout.Sharded | layout.Iteration):
        raise LayoutError(f"{artifact} is not a converted, sharded or trained model")
    if layout.inside(args.proof) != artifact.proof:
        raise LayoutError(f"the proof of {artifact} is {artifact.proof}, not {args.proof}")
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # ranks are forked: see run_ranks
    from plait.verify.parity import prove_converted, prove_iteration

    reference, target = Path(layout.inside(args.reference)), Path(args.proof)
    if isinstance(artifact, layout.Iteration):
        prove_iteration(reference, Path(str(artifact)), target)
    else:
        by = settings(args, artifact, "verify").get("proof", "logits")
        prove_converted(reference, Path(str(artifact)), target, by=by)
