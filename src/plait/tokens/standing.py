"""Packed shards that a user has put where plait would write them."""

from pathlib import Path
from typing import Any

import numpy as np

from plait import files
from plait.errors import DataError
from plait.fetch.lfs import refuse_pointers
from plait.foreign import Found
from plait.layout import FAST, Indexed
from plait.tokens.indexed import ROLE, TEXT, IndexedReader

STATS = "data_stats.json"


def packed(target: Indexed, tokenizer: Path) -> Found:
    """A folder of indexed files with the statistics of the stage that packed it, by the plan's tokenizer.

    Raises:
        DataError: the files do not agree with one another, with the statistics or with the tokenizer.
    """
    folder = Path(str(target))
    if not (folder / STATS).is_file():
        raise DataError(
            f"{target} has no {STATS}, so nothing says how it was packed and by which tokenizer",
            hint="move it away and ask for it: it is packed again from its chat records",
        )
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    refuse_pointers(found)
    facts: dict[str, Any] = files.read_json(folder / STATS)
    text, role = IndexedReader(folder / TEXT), IndexedReader(folder / ROLE)
    most = max((int(stretch.max()) for stretch in text.stretches()), default=0)
    checks = {
        f"{facts.get('packs')} packs": facts.get("packs") == len(text),
        f"at most {target.seq} tokens a pack": int(text.sizes.max(initial=0)) <= target.seq,
        f"a role for each token of {TEXT}": np.array_equal(text.sizes, role.sizes),
        f"tokens below {facts.get('vocab_size')}": most < int(facts.get("vocab_size", 0)),
        f"the tokenizer {tokenizer}": facts.get("tokenizer") == files.digest(tokenizer / FAST),
    }
    wrong = [words for words, holds in checks.items() if not holds]
    if wrong:
        raise DataError(
            f"{target} is not what {STATS} and its name say; expected: {', '.join(wrong)}",
            hint="move it away and ask for it: it is packed again from its chat records",
        )
    return Found("indexed", [path.name for path in found], facts)
