"""Special tokens: their names, groups and sizes. No other module spells one.

The groups that a tokenizer can be extended by, at the ids they get on the 32,000 pieces of Mistral
v1 as ``[vision, locations, chatml]``::

    vision     32000  <vision> <vpatch> <vrow_sep> <vframe_sep> </vision>
    locations  32005  <loc_1> ... <loc_1024>
    chatml     33029  <|im_start|> <|im_end|>

    image      (for LLaVA, whose pictures are one token, repeated)  <image> <pad>

>>> padded_vocab_size(33_031, tp=2)
33280
>>> picture_text(2, 2)
'<vision><vpatch><vpatch><vrow_sep><vpatch><vpatch></vision>'
"""

VISION_START, VISION_PATCH, VISION_ROW, VISION_FRAME, VISION_END = (
    "<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>",
)  # fmt: skip
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE, PADDING = "<image>", "<pad>"
GROUPS: dict[str, tuple[str, ...]] = {
    "vision": (VISION_START, VISION_PATCH, VISION_ROW, VISION_FRAME, VISION_END),
    "locations": tuple(f"<loc_{number}>" for number in range(1, 1025)),
    "chatml": (TURN_START, TURN_END),
    "image": (IMAGE, PADDING),
}

DIVISOR = 128
"""Megatron's ``make_vocab_size_divisible_by``: a rank's rows of the vocabulary are a multiple of it."""

PICTURE = VISION_START + VISION_END
"""Where a picture stands in a rendered chat template, before its patches are counted."""


def padded_vocab_size(size: int, tp: int, divisor: int = DIVISOR) -> int:
    """Rows of the embedding on a grid: the smallest multiple of ``divisor`` * tp that holds ``size``."""
    return -(-size // (divisor * tp)) * divisor * tp


def picture_text(rows: int, columns: int) -> str:
    """A picture as tokens: a patch each, a row mark before every row but the first.

    These are rows * columns + rows + 1 tokens.
    """
    return VISION_START + VISION_ROW.join([VISION_PATCH * columns] * rows) + VISION_END
