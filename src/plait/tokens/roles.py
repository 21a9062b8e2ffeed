"""Who speaks: the role code that every token carries. The loss mask follows from it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

SYSTEM, USER, ASSISTANT, IMAGE, PACK_SEP = 0, 1, 2, 3, 1000
"""IMAGE stands on picture patches only, PACK_SEP on the token that separates a document from the one
before it in a pack: its own BOS, or one put before it if it has none. Positions restart there."""

CODES: dict[str, int] = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


def loss_tokens(text: NDArray[Any], role: NDArray[Any], vision: Mapping[str, int]) -> int:
    """The number of tokens that an assistant wrote, picture markup not counted."""
    return int(np.count_nonzero(trained(text, role, vision)))


def trained(text: NDArray[Any], role: NDArray[Any], vision: Mapping[str, int]) -> NDArray[np.bool_]:
    """Which tokens an assistant wrote, picture markup left out: (n,), true for each of them."""
    return np.asarray((role == ASSISTANT) & ~markup(text, vision) if vision else role == ASSISTANT)


def markup(text: NDArray[Any], vision: Mapping[str, int]) -> NDArray[np.bool_]:
    """Which tokens stand for pictures: (n,); none where the tokenizer has no such tokens."""
    return np.isin(text, list(vision.values())) if vision else np.zeros(len(text), np.bool_)
