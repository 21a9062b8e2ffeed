"""Packs as Megatron-LLM wrote them (SOLO, CodeActAgent), written anew as plait's own.

Their files are Megatron's indexed ones with codes of their own for some types, and no document is ever
closed: the list of bounds has its first 0 only. SOLO has four pairs: text, role, indices into patches, and
patches as halves (code 10), of which a pack without pictures has one of zeros. CodeActAgent has the first
two.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait import files
from plait.errors import DataError
from plait.tokens import indexed, roles
from plait.tokens.indexed import INDICES, PATCHES, ROLE, TEXT, IndexedReader, IndexedWriter
from plait.tokens.made_by import made_by
from plait.tokens.vocabulary import VISION_START

CODES: dict[int, str] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float64", 8: "uint16",
    9: "float32", 10: "float16",
}  # fmt: skip
"""Megatron-LLM's: 7 is a double, where Megatron Core has a single; 9 and 10 are SOLO's."""
HINT = "name the folder with data-text.bin, data-role.bin and so on, whole as it was written"
ROLES = (*roles.CODES.values(), roles.IMAGE, roles.PACK_SEP)
log = logging.getLogger(__name__)


class Originals:
    """The packs of a folder."""

    def __init__(self, folder: Path, patch_size: int) -> None:
        """Map the files.

        Raises:
            DataError: one is missing or damaged, or they have not the same packs.
        """
        self.folder, self.values = folder, 3 * patch_size**2
        self._text, self._role = self._open(TEXT), self._open(ROLE)
        both = [(folder / f"{name}.idx").is_file() for name in (INDICES, PATCHES)]
        if any(both) and not all(both):
            raise DataError(f"{folder} has one of {INDICES} and {PATCHES}, and not the other", hint=HINT)
        self.pictured = all(both)
        self._indices = self._open(INDICES) if self.pictured else None
        self._patches = self._open(PATCHES) if self.pictured else None
        for name, other in ((ROLE, self._role), (INDICES, self._indices)):
            if other is not None and not np.array_equal(other.sizes, self._text.sizes):
                raise DataError(f"{folder / name} has not a value for each token of {TEXT}", hint=HINT)
        if self._patches is not None and len(self._patches) != len(self._text):
            raise DataError(
                f"{folder} has {len(self._text)} packs and {len(self._patches)} of patches", hint=HINT
            )

    def _open(self, name: str) -> IndexedReader:
        found = IndexedReader(self.folder / name, CODES)
        possible = ([0], [0, len(found)], np.arange(len(found) + 1))
        if not any(np.array_equal(found.bounds, bounds) for bounds in possible):
            raise DataError(f"{self.folder / name}.idx has documents of several packs", hint=HINT)
        return found

    def __len__(self) -> int:
        return len(self._text)

    @property
    def longest(self) -> int:
        """Tokens of the longest pack."""
        return int(self._text.sizes.max(initial=0))

    def pack(self, number: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Text, role and patch indices (n,) of a pack, and its patches as the bits of halves (m, values).

        Raises:
            DataError: they contradict one another.
        """
        text, role = (one[number].astype(np.int64) for one in (self._text, self._role))
        indices = np.full(len(text), -1, np.int64)
        patches = np.zeros((0, self.values), np.float16)
        if self._indices is not None and self._patches is not None:
            indices, patches = self._indices[number].astype(np.int64), self._halves(number)
        if not (indices >= 0).any():
            if len(patches) > 1 or patches.any():
                raise DataError(f"pack {number} of {self.folder} has patches that no token is of", hint=HINT)
            patches = patches[:0]
        checks = {
            "roles that are known": np.isin(role, ROLES).all(),
            "an index for each token of a picture, and for no other": np.array_equal(
                role == roles.IMAGE, indices >= 0
            ),
            "a patch for each index": indices.max(initial=-1) < len(patches) and indices.min(initial=0) >= -1,
        }
        wrong = [words for words, holds in checks.items() if not holds]
        if wrong:
            raise DataError(f"pack {number} of {self.folder} has not {', '.join(wrong)}", hint=HINT)
        return text, role, indices, patches.view(np.uint16)

    def _halves(self, number: int) -> NDArray[np.float16]:
        assert self._patches is not None
        found = self._patches[number]
        halves = found.astype("<f2")
        if halves.size % self.values or not np.array_equal(halves.astype(found.dtype), found):
            raise DataError(
                f"pack {number} of {self.folder / PATCHES} is of {found.size} values of {found.dtype}; "
                f"expected halves, {self.values} a patch",
                hint="--patch-size says how many pixels a side of a patch has",
            )
        return halves.reshape(-1, self.values)


def repack(
    folder: Path, source: Path, tokenizer: Path, *, limit: int | None = None, patch_size: int = 32,
    max_resolution: int = 1024,
) -> dict[str, Any]:  # fmt: skip
    """Write the packs of a folder into another, which is empty, as the index stage would.

    Args:
        folder: where they go.
        source: the folder of Megatron-LLM's files.
        tokenizer: the tokenizer that made them, as plait has it.
        limit: tokens of a sequence; None: those of the longest pack.
        patch_size: side of a patch, in pixels.
        max_resolution: longest side of a picture, in pixels.

    Returns:
        What data_stats.json holds, of which ``plait adopt`` makes the manifest.

    Raises:
        DataError: the files are not what they should be, a pack is longer than ``limit`` (SOLO wrote such),
            or a token is not of the tokenizer.
    """
    facts = files.read_manifest(tokenizer, kind="tokenizer")["facts"]
    packs = Originals(source, patch_size)
    limit = limit or packs.longest
    if not len(packs):
        raise DataError(f"{source} has no pack", hint=HINT)
    if packs.longest > limit:
        raise DataError(
            f"{source} has a pack of {packs.longest} tokens, longer than {limit}; training would cut it",
            hint=f"name a target of pack{packs.longest}, or pack the chat records again",
        )
    found = _facts(*_write(folder, packs, facts), limit) | {
        **{key: digest for key, digest in made_by(tokenizer, "pretrain").items() if key != "template"},
        **{key: facts[key] for key in ("vocab_size", "bos_id", "eos_id", "vision")},
        "patch_size": patch_size,
        "max_resolution": max_resolution,
    }
    files.write_json(folder / "data_stats.json", found)
    log.info(
        "%s: %d packs, %d documents, %d tokens", source, found["packs"], found["documents"], found["tokens"]
    )
    return found


def _write(folder: Path, packs: Originals, facts: Mapping[str, Any]) -> tuple[Mapping[str, int], int]:
    """What the packs sum up to, and how many documents they have."""
    documents = 0
    with ExitStack() as stack:

        def opened(name: str, dtype: Any) -> IndexedWriter:
            return stack.enter_context(IndexedWriter(folder / name, dtype))

        out = [opened(TEXT, indexed.text_dtype(facts["vocab_size"])), opened(ROLE, np.uint16)]
        if packs.pictured:
            out += [opened(INDICES, np.int32), opened(PATCHES, np.uint16)]
        rows = stack.enter_context(indexed.RowsWriter(folder))
        for number in range(len(packs)):
            columns = packs.pack(number)
            if columns[0].min(initial=0) < 0 or columns[0].max(initial=0) >= facts["vocab_size"]:
                raise DataError(
                    f"pack {number} of {packs.folder} has the token {columns[0].max()}, the tokenizer "
                    f"{facts['vocab_size']} tokens",
                    hint="name the tokenizer that made them",
                )
            for file, column in zip(out, columns, strict=False):
                file.document(column)
            text, role, *_ = columns
            images = int(np.count_nonzero(text == facts["vision"][VISION_START])) if facts["vision"] else 0
            learnt = roles.loss_tokens(text, role, facts["vision"])
            rows.packs([len(text)], [int(np.count_nonzero(role == roles.IMAGE))], [images], [learnt])
            documents += int(np.count_nonzero(role == roles.PACK_SEP)) + 1
    return rows.totals, documents


def _facts(totals: Mapping[str, int], documents: int, limit: int) -> dict[str, Any]:
    return {
        **totals,
        "documents": documents,
        "limit": limit,
        "fill": round(totals["tokens"] / (totals["packs"] * limit), 6),
        "own_separators": False,
    }
