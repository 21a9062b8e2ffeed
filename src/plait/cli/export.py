"""``plait export``: a trained checkpoint as a Hugging Face folder, proven before it appears."""

import argparse
import os
from pathlib import Path

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings


def add(stages: Subparsers) -> None:
    """Add the command."""
    stage = add_stage(
        stages,
        "export",
        "make a Hugging Face folder of a trained checkpoint, and its proof",
        "data/models/raw_hf/Mistral-tiny-chatml data/ckpts/chat-tiny/iter_0000100 "
        "data/ckpts/chat-tiny/hf/model_iter_100",
    )
    stage.add_argument("source", help="the Hugging Face folder that the run's model was made from")
    stage.add_argument("iteration", help="the checkpoint, data/ckpts/RUN/iter_NNNNNNN")
    stage.add_argument("target", help="the export, data/ckpts/RUN/hf/model_iter_N")
    add_settings(stage)
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the folder, prove it against the checkpoint, and only then let it appear."""
    target = layout.Export.parse(args.target)
    iteration = layout.Iteration.parse(args.iteration)
    found = settings(args, target)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # ranks are forked: see run_ranks
    from plait.convert.export import export_folder
    from plait.models.specs import Spec
    from plait.tokens.pictures import name_of
    from plait.tokens.templates import chat_template
    from plait.verify import parity

    source, checkpoint = Path(args.source), Path(str(iteration))
    with files.appears_whole(str(target), folder=True) as folder:
        template = chat_template(found["template"], name_of(source, Spec.of(source).image_token_id))
        facts = export_folder(source, checkpoint, folder, recipe=found["recipe"], chat_template=template)
        facts = parity.prove_export(checkpoint, folder, target, facts=facts, by=found.get("proof", "logits"))
        files.write_manifest(folder, kind="export", settings=found, inputs=[source, checkpoint], facts=facts)
