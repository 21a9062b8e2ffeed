"""``plait adopt``: take what plait did not make as if it had, once it is checked."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait import files, foreign, layout
from plait.cli.common import Subparsers, add_stage
from plait.errors import DataError, LayoutError

if TYPE_CHECKING:
    from plait.config.plan import Plan

log = logging.getLogger(__name__)

INSTEAD = {
    layout.HubTree: "remove it and ask for it: the hub is asked again",
    layout.HubFile: "remove it and ask for it: it is fetched, or linked from the hub's own cache",
    layout.Tokenizer: "move it to a folder of your own and name that in tokenizers.{0.tokenizer}",
    layout.Analysis: "move it away and ask for it: it is counted again",
    layout.Export: "move it to data/models/raw_hf/NAME, of kind folder in config/, and adopt it there",
    layout.Run: "adopt its checkpoints, data/ckpts/{0.run}/iter_NNNNNNN, one by one",
    layout.LossCurve: "move it away and ask for it",
    layout.Generated: "move it away and ask for it",
    layout.ChatBatch: "remove it and adopt its shards, one by one",
    layout.IndexedBatch: "remove it and adopt its shards, one by one",
}
"""What is not adopted, and what to do with it."""


def add(stages: Subparsers) -> None:
    """Add the command."""
    example = "data/models/raw_hf/Mistral-7B-v0.1"
    stage = add_stage(
        stages,
        "adopt",
        "check what stands at a target and was not made by plait, and take it as made",
        example,
    )
    stage.add_argument(
        "path",
        nargs="+",
        help="the path of a target, a folder or a shard of chat records: of what stands there, or of what "
        "`given` of config/ has elsewhere, which is linked there",
    )
    stage.add_argument(
        "--config",
        nargs="+",
        default=["config/config.yaml"],
        help="config files, as Snakemake has them; a later one goes over the ones before",
    )
    stage.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check each, and write its manifest; its own files stay as they are."""
    from plait.config.model import load_files
    from plait.config.plan import Plan

    plan = Plan(load_files(args.config))
    for path in args.path:
        artifact = layout.parse(path)
        with foreign.linked(artifact, plan.config.given.get(str(artifact))):
            _check_standing(artifact)
            chosen = plan.settings(artifact)
            found = check(artifact, plan, chosen)
            foreign.record(artifact, found, chosen)
        beside = f"; written beside: {', '.join(sorted(found.beside))}" if found.beside else ""
        log.info("%s: adopted as %s%s", artifact, found.kind, beside)


def _check_standing(artifact: Any) -> None:
    """There is something to adopt, and it is of a kind that can be.

    Raises:
        LayoutError: there is not; it says what to do instead.
    """
    if not Path(str(artifact)).exists():
        raise LayoutError(f"there is nothing at {artifact} to adopt")
    if type(artifact) in INSTEAD:
        raise LayoutError(f"{artifact} cannot be adopted", hint=INSTEAD[type(artifact)].format(artifact))
    if Path(artifact.manifest).exists():
        by = "was adopted already" if files.adopted(artifact) else "was made by plait"
        raise LayoutError(
            f"{artifact} {by}", hint=f"{artifact.manifest} says so; remove that to adopt it anew"
        )


def check(artifact: Any, plan: "Plan", chosen: Mapping[str, Any]) -> foreign.Found:
    """Check an artifact by the stage that would have made it.

    Raises:
        ConfigError, DataError, CheckpointError: it is not what its path and config/ say.
    """
    match artifact:
        case layout.Raw() | layout.Chat() | layout.Energon():
            from plait.data import standing as of_data

            return of_data.check(artifact, chosen)
        case layout.HfModel():
            from plait.models import standing as of_models

            return of_models.model(artifact, chosen["source"]["kind"])
        case layout.Indexed():
            from plait.tokens import standing as of_tokens

            return of_tokens.packed(artifact, _made(plan.tokenizer_of(artifact), artifact))
        case layout.Megatron() | layout.Sharded():
            from plait.convert import standing as of_conversion

            if isinstance(artifact, layout.Sharded):
                plan.check_grid(artifact)
            return of_conversion.model(artifact, _made(plan.hf(artifact.model), artifact), chosen)
        case _:
            from plait.convert import standing as of_conversion

            hf = plan.hf(plan.run(artifact.run).model)
            return of_conversion.iteration(artifact, _made(hf, artifact), chosen)


def _made(needed: layout.Artifact, artifact: layout.Artifact) -> Path:
    """The folder of what an artifact is compared with.

    Raises:
        DataError: it is not there yet.
    """
    if not Path(needed.manifest).is_file():
        raise DataError(
            f"{artifact} is compared with {needed}, which is not there yet", hint=f"snakemake {needed}"
        )
    return Path(str(needed))
