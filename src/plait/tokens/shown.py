"""Documents drawn at random, as they are trained: their tokens, what is learnt, their pictures.

Only the documents that are drawn are read. n = tokens of a document, k = its pictures.
"""

import heapq
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from plait.data import images
from plait.data.lines import read_lines
from plait.data.webdataset import SAMPLES
from plait.errors import DataError
from plait.layout import FAST
from plait.tokens.analysis import Counted, document_bounds
from plait.tokens.indexed import ROLE, IndexedReader, Pack, PackedShard
from plait.tokens.lineage import Lineage
from plait.tokens.llava import Encoded
from plait.tokens.roles import IMAGE, trained
from plait.tokens.vocabulary import VISION_ROW

if TYPE_CHECKING:
    from PIL.Image import Image

PER_SOURCE = 20
"""Documents drawn of each source."""
SEED = 1234
MOST_PICTURES = 6
"""Pictures of a document that are shown."""
SIDE = 192
"""The longest side of a picture as it is shown."""
JPEG_QUALITY = 80
BYTES = 4
"""A character in UTF-8 has no more bytes, and so is of no more tokens."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Thumbnail:
    """A picture made small: a JPEG, and the width and height it had."""

    jpeg: bytes
    width: int
    height: int

    @classmethod
    def of(cls, image: "Image") -> Self:
        """Shrink a picture, if it is large."""
        width, height = image.size
        image.thumbnail((SIDE, SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=JPEG_QUALITY)
        return cls(out.getvalue(), width, height)


@dataclass(frozen=True)
class Shown:
    """A document as it is trained.

    Attributes:
        source: the raw file and line, or what else names it for good.
        place: where it lies among what training reads.
        ids: (n,) token ids.
        trained: (n,), true where a token is learnt.
        picture: (n,), which of its pictures a token is of, marks between rows included; -1 elsewhere.
        image_tokens: those that are patches or features, without the marks.
        pictures: those that are shown, in order; there may be more.
    """

    source: str
    place: str
    ids: Ints
    trained: NDArray[np.bool_]
    picture: Ints
    image_tokens: int
    pictures: Sequence[Thumbnail]

    def to_json(self) -> dict[str, Any]:
        """What it is and how much of it is what, for page.json."""
        return {
            "source": self.source,
            "place": self.place,
            "tokens": len(self.ids),
            "loss_tokens": int(self.trained.sum()),
            "image_tokens": self.image_tokens,
            "images": int(self.picture.max(initial=-1)) + 1,
        }


# Drawing


def _random(dataset: str) -> np.random.Generator:
    """The dataset's own numbers, whatever other datasets there are."""
    return np.random.default_rng([SEED, *dataset.encode()])


def drawn(dataset: str, total: int) -> Ints:
    """The numbers of the documents of a dataset that are shown, in order."""
    few = _random(dataset).choice(total, min(total, PER_SOURCE), replace=False)
    return np.sort(few.astype(np.int64))


@dataclass
class Draw:
    """Draws from a stream of samples, of which some are rejected on the way."""

    ranks: Ints
    kept: list[tuple[int, int, Callable[[], Shown]]] = field(default_factory=list)

    @classmethod
    def of(cls, dataset: str, total: int) -> Self:
        """Draw from a dataset of so many samples."""
        return cls(_random(dataset).permutation(total))

    def offer(self, number: int, make: Callable[[], Shown]) -> None:
        """Keep sample ``number`` of the stream if its rank is among the lowest so far."""
        if number >= len(self.ranks):
            return  # more than the manifest counts: who counts says so
        rank = -int(self.ranks[number])
        if len(self.kept) < PER_SOURCE:
            heapq.heappush(self.kept, (rank, number, make))
        elif rank > self.kept[0][0]:
            heapq.heapreplace(self.kept, (rank, number, make))

    @property
    def shown(self) -> list[Shown]:
        """Those that were kept, in the stream's order; they are made now."""
        return [make() for _, _, make in sorted(self.kept, key=lambda entry: entry[1])]


# Packs


def of_packs(dataset: str, shards: Sequence[Counted]) -> list[Shown]:
    """Documents of a dataset's packed shards.

    Raises:
        DataError: a shard's pictures are not those of its tokens.
    """
    ends = np.cumsum([len(shard.measures["document_tokens"]) for shard in shards])
    numbers = drawn(dataset, int(ends[-1]))
    found: list[Shown] = []
    for place, several in groupby(numbers, key=lambda number: int(np.searchsorted(ends, number, "right"))):
        before = int(ends[place - 1]) if place else 0
        found += _documents(Path(str(shards[place].source)), [int(number) - before for number in several])
    return found


def _documents(folder: Path, numbers: Sequence[int]) -> Iterator[Shown]:
    shard, roles = PackedShard(folder), IndexedReader(folder / ROLE)
    lineage = Lineage(folder) if Lineage.stands(folder) else None
    starts, ends = document_bounds(folder, own_separators=shard.facts["own_separators"])
    packs = np.concatenate([[0], np.cumsum(roles.sizes, dtype=np.int64)])
    for number in numbers:
        start, end = int(starts[number]), int(ends[number])
        pack = int(np.searchsorted(packs, start, "right")) - 1
        first = int(np.searchsorted(starts, packs[pack]))
        origin = str(lineage[pack][number - first]) if lineage else "unknown: the shard has no lineage"
        inside = slice(start - int(packs[pack]), end - int(packs[pack]))
        where = f"{folder.name}, pack {pack}, tokens {inside.start:,} to {inside.stop - 1:,}"
        yield _document(shard, shard.pack(pack), inside, origin, where)


def _document(shard: PackedShard, pack: Pack, inside: slice, source: str, where: str) -> Shown:
    """The tokens of a pack between two bounds, with the pictures that they are patches of."""
    vision: Mapping[str, int] = shard.facts.get("vision") or {}
    of = picture_numbers(pack.text, pack.role, vision.get(VISION_ROW))
    if pack.patches is None and of.max(initial=-1) + 1 != len(pack.pictures):
        raise DataError(
            f"{shard.folder}: the tokens of {where} are of {of.max(initial=-1) + 1} pictures, its pack holds "
            f"{len(pack.pictures)}",
            hint="remove the folder; it is made again",
        )
    own = of[inside]
    seen = np.unique(own[own >= 0])
    return Shown(
        source,
        where,
        pack.text[inside],
        trained(pack.text, pack.role, vision)[inside],
        np.where(own >= 0, own - (seen[0] if seen.size else 0), -1),
        int(np.count_nonzero(pack.role[inside] == IMAGE)),
        [_thumbnail(shard.facts, pack, of, int(one)) for one in seen[:MOST_PICTURES]],
    )


def picture_numbers(text: Ints, role: Ints, row: int | None) -> Ints:
    """Which picture each token of a pack is a patch or a row mark of, (n,); -1 elsewhere.

    The patches of a picture and the marks between its rows stand together; its other tokens are around them.
    """
    patch = role == IMAGE
    member = patch | (text == (-1 if row is None else row))
    run = np.cumsum(member & ~np.concatenate([[False], member[:-1]]))
    with_patches = np.unique(run[patch])
    member &= np.isin(run, with_patches)
    return np.where(member, np.searchsorted(with_patches, run), -1).astype(np.int64)


def _thumbnail(facts: Mapping[str, Any], pack: Pack, of: Ints, number: int) -> Thumbnail:
    """A picture as the model sees it: of whole patches; one that is stored as patches, in whole rows."""
    if pack.patches is None:
        grid = {key: facts[key] for key in ("patch_size", "max_resolution")}
        return Thumbnail.of(images.in_whole_patches(pack.pictures[number], **grid))
    indices = pack.patch_indices[of == number]
    rows = np.split(indices, np.flatnonzero(indices < 0))
    widest = max(int((row >= 0).sum()) for row in rows)
    whole = [row[row >= 0] for row in rows if (row >= 0).sum() == widest]
    return Thumbnail.of(images.unpatched(pack.patches[np.concatenate(whole)], widest))


# Samples of energon


def of_sample(folder: Path, tar: str, key: str, sample: Encoded, tokens: int) -> Shown:
    """A sample as the trainer takes it in, clipped.

    Args:
        folder: its dataset.
        tar: the file that it is in.
        key: its key there.
        sample: its tokens.
        tokens: those of a picture.
    """
    learnt = sample.trained.copy()
    learnt[:1] = False  # the first token is nothing's next
    rows = sample.picture_rows
    cut = f", clipped by {sample.clipped:,} tokens" if sample.clipped else ""
    pictures = [Thumbnail.of(images.upright(each)) for each in sample.pictures[:MOST_PICTURES]]
    which = np.where(rows >= 0, rows // tokens, -1)
    return Shown(
        f"{folder / tar}: {key}",
        f"{tar}, {key}{cut}",
        sample.input_ids,
        learnt,
        which,
        int(np.count_nonzero(rows >= 0)),
        pictures,
    )


def with_sources(folder: Path, shown: Sequence[Shown]) -> list[Shown]:
    """Samples of an energon dataset named by their raw lines, where the dataset knows them."""
    if not (folder / SAMPLES).is_file():
        return [*shown]
    wanted = {one.source for one in shown}
    raw: dict[str, str] = {}
    for _, line in read_lines(folder / SAMPLES):
        row = orjson.loads(line)
        name = f"{folder / row['tar']}: {row['key']}"
        if name in wanted and row.get("raw"):
            raw[name] = f"{row['raw']}:{row['raw_line']}"
    return [replace(one, source=raw.get(one.source, one.source)) for one in shown]


# Texts of tokens


class Words:
    """What tokens are as texts."""

    def __init__(self, folder: Path) -> None:
        """Read a tokenizer's folder."""
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / FAST))
        self.special = {
            number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    def texts(self, ids: Sequence[int]) -> list[tuple[list[int], str]]:
        """Tokens with their text; those that are one character only together stand together.

        A token's text is what it adds to that of those before it: alone it might lose its space.
        """
        found: list[tuple[list[int], str]] = []
        before: list[int] = []
        waiting: list[int] = []
        for number in ids:
            waiting.append(number)
            text = self._decoded(before + waiting)[len(self._decoded(before)) :]
            if text.endswith("\ufffd") and len(waiting) < BYTES:
                continue
            found.append((waiting, text))
            before, waiting = waiting, []
        return [*found, *([(waiting, "\ufffd")] if waiting else [])]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
