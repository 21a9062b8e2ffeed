"""A base model with rows for the tokens its tokenizer gained."""

import logging
from pathlib import Path
from typing import Any

from plait.config.model import ExtendedModel
from plait.models.common import (
    check_carried,
    copy_tokenizer,
    open_base,
    tokenizer_facts,
    with_rows,
    write_configs,
)
from plait.models.specs import ARCHITECTURES, LLAVA
from plait.models.weights import FolderTensors, write_down, write_safetensors

log = logging.getLogger(__name__)
STD = 0.02
KNOWN = tuple(name for name in ARCHITECTURES if name != LLAVA)


def extend(folder: Path, settings: ExtendedModel, *, base: Path, tokenizer: Path) -> dict[str, Any]:
    """Write the model into an empty folder; the facts of its manifest.

    Raises:
        CheckpointError: the base is not what its config says, or has more rows than there are tokens.
    """
    facts = tokenizer_facts(tokenizer)
    config, tensors = open_base(base, known=KNOWN)
    grown = with_rows(
        tensors,
        vocab_size=facts["vocab_size"],
        policy=settings.new_rows,
        std=config.get("initializer_range", STD),
        seed=settings.seed,
    )
    copy_tokenizer(tokenizer, folder)
    write_configs(folder, config, facts)
    write_safetensors(folder, grown)
    built = FolderTensors(folder)
    carried = check_carried(tensors, built)
    sizes = (config["vocab_size"], facts["vocab_size"])
    log.info("%d tensors carried, %d -> %d tokens%s", carried, *sizes, tensors.note)
    return write_down(built)
