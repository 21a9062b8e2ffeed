"""Who speaks: the role code that every token carries. The loss mask follows from it."""

SYSTEM, USER, ASSISTANT, IMAGE, PACK_SEP = 0, 1, 2, 3, 1000
"""IMAGE stands on picture patches only, PACK_SEP on the token that separates a document from the one
before it in a pack: its own BOS, or one put before it if it has none. Positions restart there."""

CODES: dict[str, int] = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
