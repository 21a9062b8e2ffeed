"""The inputs of a proof: drawn by a fixed seed over the whole vocabulary, alone, packed, and with pictures.

B = sequences, S = tokens, N = patches, P = values of a patch, I = pictures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.models.specs import Spec

SEQUENCES, TOKENS, PATCHES, WORDS = 2, 48, 4, 5
"""Sequences are as long as ``TOKENS`` or a multiple: tensor parallel ranks of experts share each evenly."""


@dataclass(frozen=True)
class Case:
    """One input of a proof.

    Attributes:
        name: what it tries.
        input_ids: [B, S].
        documents: [B, S], the document of each token; the reference sees each document alone.
        pictures: SOLO's patches [N, P], or a tower's pictures [I, 3, side, side].
        picture_rows: [B, S], a row of the patches or of all features laid end to end, or -1.
    """

    name: str
    input_ids: Tensor
    documents: Tensor
    pictures: Tensor | None = None
    picture_rows: Tensor | None = None


def cases(spec: Spec) -> list[Case]:
    """Inputs drawn by a fixed seed over the whole vocabulary: alone, packed, and with pictures."""
    draw = torch.Generator().manual_seed(20_240)
    shape = (SEQUENCES, TOKENS)
    packed = torch.tensor([0] * 11 + [1] * 1 + [2] * (TOKENS - 12)).expand(shape)
    found = [
        Case(name, _words(spec, shape, draw), documents)
        for name, documents in (("text", torch.zeros(shape, dtype=torch.long)), ("packed", packed))
    ]
    if spec.patch_dim:
        found.append(_patches(spec, draw))
    if spec.vision is not None:
        found += [_pictures(spec, draw, "one picture", 1), _pictures(spec, draw, "several pictures", 2)]
    return found


def _words(spec: Spec, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Any ids but that of a picture, which must have a picture to stand for."""
    ids = torch.randint(spec.vocab_size, shape, generator=draw)
    other = int(spec.image_token_id == 0)
    return ids if spec.image_token_id is None else ids.masked_fill(ids == spec.image_token_id, other)


def _patches(spec: Spec, draw: torch.Generator) -> Case:
    """SOLO's patches within two sequences."""
    shape = (SEQUENCES, TOKENS)
    rows = torch.full(shape, -1)
    rows[0, 3 : 3 + PATCHES // 2] = torch.arange(PATCHES // 2)
    rows[1, 7 : 7 + PATCHES // 2] = torch.arange(PATCHES // 2, PATCHES)
    patches = torch.randn(PATCHES, spec.patch_dim, generator=draw)
    return Case("picture", _words(spec, shape, draw), torch.zeros(shape, dtype=torch.long), patches, rows)


def _pictures(spec: Spec, draw: torch.Generator, name: str, count: int) -> Case:
    """LLaVA's pictures, ``count`` in each of two sequences, with a few words or more around each."""
    tower = spec.vision
    assert tower is not None
    shape = (SEQUENCES, -(-(WORDS + count * (tower.tokens + WORDS)) // TOKENS) * TOKENS)
    rows, ids = torch.full(shape, -1), _words(spec, shape, draw)
    for number in range(SEQUENCES * count):
        sequence, place = divmod(number, count)
        start = WORDS + place * (tower.tokens + WORDS) - sequence
        rows[sequence, start : start + tower.tokens] = torch.arange(tower.tokens) + number * tower.tokens
    ids[rows >= 0] = int(spec.image_token_id or 0)
    pictures = torch.randn(SEQUENCES * count, 3, tower.image_size, tower.image_size, generator=draw)
    return Case(name, ids, torch.zeros(shape, dtype=torch.long), pictures, rows)
