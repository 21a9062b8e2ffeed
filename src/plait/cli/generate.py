"""``plait generate``: ask a trained model something."""

import argparse
import dataclasses
import json
import logging
from pathlib import Path

from plait import files, layout
from plait.cli.common import Subparsers, add_settings, add_stage, settings
from plait.errors import ConfigError

log = logging.getLogger(__name__)


def add(stages: Subparsers) -> None:
    """Add the command."""
    parser = add_stage(
        stages,
        "generate",
        "let a model answer a prompt, or an export the prompts of its run",
        'data/ckpts/chat-tiny/hf/model_iter_100 --prompt "Hello!"',
    )
    parser.add_argument("model", help=f"a Hugging Face folder, e.g. {layout.Export.PATTERN}")
    parser.add_argument(
        "target", nargs="?", help=f"{layout.Generated.PATTERN}; without it answers are printed"
    )
    parser.add_argument("--prompt", default="", help="what is asked")
    parser.add_argument("--image", metavar="FILE", help="a picture that stands before the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--probabilities", action="store_true", help="print the answer's tokens too")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print one answer, or write the answers of a run."""
    folder = Path(args.model)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", hint="name a Hugging Face model on this machine")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} writes nothing", hint="give 1 or more")
    if args.target is None:
        _print(folder, args)
        return
    from plait.report import answers

    target = layout.Generated.parse(args.target)
    export = str(layout.Export(run=target.run, step=target.step))
    if layout.inside(folder) != export:
        raise ConfigError(f"{target} is not answered by {folder}", hint=f"it is answered by {export}")
    found = answers.ask_all(folder, settings(args, target)["generate"])
    lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) for one in found]
    with files.appears_whole(str(target)) as part:
        part.write_text("\n".join([*lines, ""]), encoding="utf-8")
    for one in found:
        log.info("%s -> %s", one.prompt, one.answer)


def _print(folder: Path, args: argparse.Namespace) -> None:
    from plait.report import answers

    found = answers.Model(folder).ask(args.prompt, args.image, max_new_tokens=args.max_new_tokens)
    print(found.answer)  # noqa: T201
    if args.probabilities:
        print(answers.table(found))  # noqa: T201
