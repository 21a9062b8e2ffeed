"""Which part of a dataset a sample belongs to, by its id alone.

No other sample, shard or order has a say, so a sample stays where it is when data are appended.

>>> takes({"part": "train", "validation": 0.5}, "a"), takes({"part": "validation", "validation": 0.5}, "a")
(True, False)
"""

import hashlib
from collections.abc import Mapping
from typing import Any

STEPS = 2**64
EMPTY = "fewer `shards`, or another `by_hash.validation`, give each shard of this part some records"
"""What helps where a shard has no sample of a part."""


def place(id_: str) -> float:
    """Where an id falls between 0 and 1: evenly, by its sha256."""
    return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") / STEPS


def takes(by_hash: Mapping[str, Any] | None, id_: str) -> bool:
    """Whether a sample is of a dataset's part.

    Args:
        by_hash: ``datasets.*.by_hash`` of the config; None takes every sample.
        id_: the sample's.
    """
    if by_hash is None:
        return True
    validates = place(id_) < by_hash["validation"]
    return validates if by_hash["part"] == "validation" else not validates
