"""The index stage: chat records to packed shards in Megatron's indexed format.

    chat shards -> samples -> pieces of text and pictures -> documents -> packs -> .bin/.idx

Every record ends as packed or as rejected, in ``rejects.jsonl``, with a reason; every document longer
than a pack is split or dropped, and counted either way.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from plait import files, layout
from plait.data import chat, ledger, said, split
from plait.data.images import patches
from plait.data.lines import read_lines
from plait.data.prints import Prints, Seen
from plait.data.rejects import NAME, Record, Rejects, to_json
from plait.errors import DataError, RecordError
from plait.progress import bar
from plait.tokens import indexed
from plait.tokens.documents import Batch, Documents, Picture, counts
from plait.tokens.lineage import Origins
from plait.tokens.made_by import made_by
from plait.tokens.pack import Packing, Pieces, cut, pack
from plait.tokens.render import Renderer
from plait.tokens.roles import ASSISTANT, IMAGE, PACK_SEP
from plait.tokens.templates import Piece

log = logging.getLogger(__name__)

BATCH, SIZE = 256, 1 << 22
"""Conversations tokenised at once, and their characters and bytes of pictures: little enough for memory."""


def build(
    folder: Path,
    tokenizer: Path,
    chats: Sequence[Path],
    form: Mapping[str, Any],
    limit: int,
    taken: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an indexed shard into an empty folder.

    Args:
        folder: where the files go.
        tokenizer: the tokenizer's folder.
        chats: files of chat records; they are packed jointly, in this order.
        form: a format of the config.
        limit: tokens of a pack.
        taken: ``by_hash`` and ``duplicates`` of the dataset, where they are not the defaults.

    Returns:
        The facts of its manifest, which data_stats.json holds too.

    Raises:
        DataError: an input is not what it should be, more records are rejected than the format's
            ``reject_limit`` allows, or no document is left to pack.
    """
    renderer, records = Renderer(tokenizer, form), Records(chats, taken or {})
    dtype = indexed.text_dtype(renderer.facts["vocab_size"])
    with Documents(dtype) as documents, Prints(folder) as prints:
        origins = Origins()
        rejected, without_loss = _collect(documents, origins, prints, renderer, records, folder / NAME, form)
        cuts = cut(documents.lengths, limit, form["overlong"])
        begins = documents.tokens_at(cuts.document, cuts.start) == renderer.separator
        packing = pack(cuts.lengths, limit, form["packing"], separators=~begins)
        if not len(packing):
            raise DataError(
                f"no document is left to pack: {len(documents)} were read, {cuts.dropped} are too long, "
                f"rejected are {rejected}, {records.others} are of the dataset's other part",
                hint=split.EMPTY if records.others else "look at the ledgers of the chat shards",
            )
        rows = PackWriter(folder, renderer, form).write(Packs(documents, cuts, packing, renderer.separator))
        origins.write(folder, cuts, packing)
        facts = {
            **_counts(rows, packing, cuts, documents.lengths),
            "documents": len(documents) - cuts.dropped,
            "without_loss": without_loss,
            "own_separators": bool(begins[cuts.start == 0].all()),
            "read": len(documents) + sum(rejected.values()),
            "rejected": rejected,
            "other_part": records.others,
            "duplicates": records.duplicates,
            **made_by(renderer.folder, form["template"], renderer.vocabulary),
            **{key: renderer.facts[key] for key in ("vocab_size", "bos_id", "eos_id", "vision")},
            **{key: form[key] for key in ("patch_size", "max_resolution")},
        }
    indexed.write_rows(folder / "data.jsonl", rows)
    files.write_json(folder / "data_stats.json", facts)
    _report(facts, packing)
    return facts


def outcomes(facts: Mapping[str, Any]) -> dict[str, int]:
    """What became of the records that a shard was made from, by its facts."""
    return {
        "packed": facts["documents"],
        "too_long": facts["dropped"],
        "rejected": sum(facts["rejected"].values()),
        "other_part": facts["other_part"],
    }


# Records to documents


def _collect(
    documents: Documents,
    origins: Origins,
    prints: Prints,
    renderer: Renderer,
    records: "Records",
    rejects: Path,
    form: Mapping[str, Any],
) -> tuple[dict[str, int], int]:
    """Take in every record that teaches something; count the others by reason, and those without loss.

    Where the format's ``no_loss`` is ``count``, a document that no assistant speaks in is kept: a run may
    train what others say.
    """
    without_loss = 0
    with rejects.open("wb") as out:
        rejected = Rejects(out)
        for batch in _batches(_pieces(renderer, records, rejected)):
            found = renderer.documents([pieces for _, pieces in batch])
            words = _words(found, renderer.vision)
            taught = found.counts(trained(found.text, found.role, renderer.vision))
            kept = []
            for number, (one, _) in enumerate(batch):
                record = one.record
                if not words[number]:
                    rejected.add(record, "no_text", "no token of text is in it")
                    continue
                if not taught[number] and form["no_loss"] == "reject":
                    rejected.add(record, "no_loss", "no token of it is an assistant's, so none is trained")
                    continue
                without_loss += not taught[number]
                kept.append(number)
                origins.append(record, one.sample.source)
                prints.append(one.sample, one.name, one.row)
            documents.extend(found, kept)
    rejected.check(
        len(documents) + rejected.count,
        form["reject_limit"],
        ", ".join(map(str, records.chats)),
        "mend the source, name another template, or raise `reject_limit` of the format in config/",
    )
    return to_json(rejected.reasons), without_loss


def _words(found: Batch, vision: Mapping[str, int]) -> list[int]:
    """Tokens of each document but those that stand for pictures."""
    return found.counts(~markup(found.text, vision)) if vision else np.diff(found.starts).tolist()


@dataclass
class Records:
    """The records of files of chat records, one after another.

    Attributes:
        chats: the files.
        taken: ``by_hash`` and ``duplicates`` of the dataset.
        others: how many are of the other part, once all were read.
        duplicates: how many are equal to an earlier one.
    """

    chats: Sequence[Path]
    taken: Mapping[str, Any] = field(default_factory=dict)
    others: int = 0
    duplicates: int = 0

    def __iter__(self) -> Iterator[tuple[Record, chat.Sample, bytes | None]]:
        """Each record of the part with its place, and the row of what it says, if that is known.

        Raises:
            DataError: a line is no record, or what stands beside them is of others.
        """
        for path in self.chats:
            rows = said.Reader(path)
            for number, line in bar(read_lines(path), path.name, " records"):
                try:
                    sample = chat.parse(line)
                except RecordError as error:
                    raise DataError(
                        f"{path} line {number}: {error}",
                        hint="`plait chat` makes such files and rejects such lines",
                    ) from error
                row = rows.of(line)
                if split.takes(self.taken.get("by_hash"), sample.id):
                    yield Record(path, number, sample.id), sample, row
                else:
                    self.others += 1
            rows.end()

    def once(self, rejected: Rejects) -> Iterator["Read"]:
        """Each record but those whose id came before, and equal ones where ``duplicates`` rejects them."""
        dataset = cache(_dataset)
        with Seen() as seen:
            for record, sample, row in self:
                place = str(record)
                name = f"{dataset(record.file)}/{record.id}" if record.id else ""
                first = seen.before(name.encode(), place) if name else None
                if first is not None:
                    rejected.add(record, "duplicate_id", f"{first} has the same id")
                    continue
                found = row[said.DIGEST] if row else said.digest(sample)
                first = seen.before(found, place)
                self.duplicates += first is not None
                if first is not None and self.taken.get("duplicates") == "reject":
                    rejected.add(record, "duplicate", f"{first} says the same")
                    continue
                yield Read(record, sample, name, row)


class Read(NamedTuple):
    """A record, what it says, its id under its dataset's name if it has one, and its row if that is known."""

    record: Record
    sample: chat.Sample
    name: str
    row: bytes | None


def _dataset(file: Path) -> str:
    """Within what ids are unique."""
    shard = layout.Chat.read(layout.inside(file))
    return shard.dataset if shard else str(file)


def _pieces(renderer: Renderer, records: Records, rejected: Rejects) -> Iterator[tuple[Read, list[Piece]]]:
    for one in records.once(rejected):
        try:
            yield one, renderer.pieces(one.sample)
        except RecordError as error:
            rejected.add(one.record, error.reason, str(error))


def _batches(items: Iterator[tuple[Read, list[Piece]]]) -> Iterator[list[tuple[Read, list[Piece]]]]:
    """Lists of at most BATCH records, which end with the one that reaches SIZE."""
    batch, size = [], 0
    for read, pieces in items:
        batch.append((read, pieces))
        size += sum(len(p.content if isinstance(p.content, str) else p.content.encoded) for p in pieces)
        if len(batch) == BATCH or size >= SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def loss_tokens(text: NDArray[Any], role: NDArray[Any], vision: Mapping[str, int]) -> int:
    """The number of tokens that an assistant wrote, picture markup not counted."""
    return int(np.count_nonzero(trained(text, role, vision)))


def trained(text: NDArray[Any], role: NDArray[Any], vision: Mapping[str, int]) -> NDArray[np.bool_]:
    """Which tokens an assistant wrote, picture markup left out: (n,), true for each of them."""
    return np.asarray((role == ASSISTANT) & ~markup(text, vision) if vision else role == ASSISTANT)


def markup(text: NDArray[Any], vision: Mapping[str, int]) -> NDArray[np.bool_]:
    """Which tokens stand for pictures: (n,); none where the tokenizer has no such tokens."""
    return np.isin(text, list(vision.values())) if vision else np.zeros(len(text), np.bool_)


# Documents to packs


AT_ONCE = 1 << 20
"""Tokens of packs that are laid out and written at once."""


@dataclass(frozen=True)
class Laid:
    """Packs end to end: N tokens of P packs.

    Attributes:
        text: (N,) token ids.
        role: (N,) codes: PACK_SEP is that of the first token of each document but the first of a pack, the
            separator that it begins with, or one put before it.
        starts: (P,) where each pack begins.
        indices: (N,) of patches, counted through all pictures of a pack.
        pictures: of each pack, P times, which is read when it is asked for; ``indices`` are whole after that.
    """

    text: NDArray[Any]
    role: NDArray[np.uint16]
    starts: NDArray[np.int64]
    indices: NDArray[np.int32]
    pictures: Iterator[list[Picture]]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each pack."""
        return np.diff(self.starts, append=len(self.text))

    def counts(self, which: NDArray[np.bool_]) -> list[int]:
        """How many of each pack's tokens are so: ``which`` is (N,)."""
        return counts(which, [*self.starts.tolist(), len(self.text)])


@dataclass(frozen=True)
class Packs:
    """The packs of documents, as they shall be written."""

    documents: Documents
    cuts: Pieces
    packing: Packing
    separator: int

    def __iter__(self) -> Iterator[Laid]:
        """All packs, so many at a time that they have some AT_ONCE tokens."""
        many = max(AT_ONCE // self.packing.limit, 1)
        for first in bar(range(0, len(self.packing), many), "packs", f" times {many} packs"):
            yield self.laid(first, min(first + many, len(self.packing)))

    def laid(self, first: int, last: int) -> Laid:
        """The packs from ``first`` up to ``last``, of which there is one at least."""
        offsets = self.packing.offsets[first : last + 1]
        pieces, opening = self.packing.order[offsets[0] : offsets[-1]], offsets[:-1] - offsets[0]
        put = self.packing.separators[pieces]
        put[opening] = 0
        lengths = self.packing.lengths[pieces]
        places = np.cumsum(put + lengths) - lengths
        text = np.full(places[-1] + lengths[-1], self.separator, self.documents.dtype)
        role = np.zeros(len(text), np.uint8)
        stretches = np.column_stack([self.cuts.document, self.cuts.start, self.cuts.end])[pieces]
        self.documents.copy(stretches, places, text, role)
        wide = role.astype(np.uint16)
        wide[np.delete(places - put, opening)] = PACK_SEP
        indices = np.full(len(text), -1, np.int32)
        shown = np.split(np.column_stack([stretches, places]), opening[1:])
        pictures = (self._pictures(one, indices) for one in shown)
        return Laid(text, wide, places[opening], indices, pictures)

    def _pictures(self, pieces: NDArray[np.int64], indices: NDArray[np.int32]) -> list[Picture]:
        """The pictures of a pack; ``indices`` get those of their patches."""
        found: list[Picture] = []
        before = 0
        for number, start, end, place in pieces[self.documents.pictured[pieces[:, 0]]].tolist():
            document = self.documents[number].part(start, end)
            own = document.patch_indices
            indices[place : place + len(own)] = np.where(own >= 0, own + before, -1)
            found += document.pictures
            before += sum(picture.patches for picture in document.pictures)
        return found


class PackWriter:
    """Writes packs to the files of an indexed shard."""

    def __init__(self, folder: Path, renderer: Renderer, form: Mapping[str, Any]) -> None:
        """Take what decides the files' types and content."""
        self.folder = folder
        self.renderer = renderer
        self.grid = {key: form[key] for key in ("patch_size", "max_resolution")}
        self.encoded = form["pictures"] == "encoded"

    def write(self, packs: Packs) -> list[dict[str, int]]:
        """Write all packs and give a row of counts for each."""
        with ExitStack() as stack:

            def opened(name: str, dtype: Any) -> indexed.IndexedWriter:
                return stack.enter_context(indexed.IndexedWriter(self.folder / name, dtype))

            text, role = opened(indexed.TEXT, packs.documents.dtype), opened(indexed.ROLE, np.uint16)
            if self.renderer.vision:
                indices = opened(indexed.INDICES, np.int32)
                name, dtype = (indexed.IMAGE, np.uint8) if self.encoded else (indexed.PATCHES, np.uint16)
                pictures = opened(name, dtype)
            rows = []
            for laid in packs:
                images = [0] * len(laid.starts)
                text.documents(laid.text, laid.sizes)
                role.documents(laid.role, laid.sizes)
                if self.renderer.vision:
                    for number, found in enumerate(laid.pictures):
                        pictures.document(*self._items(found))
                        images[number] = len(found)
                    indices.documents(laid.indices, laid.sizes)
                rows += self._rows(laid, images)
        return rows

    def _items(self, pictures: list[Picture]) -> list[NDArray[Any] | bytes]:
        """Each picture's file, or the patches of all of them as the bits of halves."""
        encoded = [picture.encoded for picture in pictures]
        if self.encoded:
            return list(encoded)
        empty = np.empty((0, 3 * self.grid["patch_size"] ** 2), np.float16)
        values = np.concatenate([empty, *(patches(one, **self.grid, halves=True) for one in encoded)])
        return [values.view("<u2")]

    def _rows(self, laid: Laid, images: list[int]) -> list[dict[str, int]]:
        columns = {
            "n_tokens": laid.sizes.tolist(),
            "n_image_tokens": laid.counts(laid.role == IMAGE) if self.renderer.vision else images,
            "n_images": images,
            "n_loss_tokens": laid.counts(trained(laid.text, laid.role, self.renderer.vision)),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# Figures


def totals(rows: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What the rows of packs sum up to."""
    names = {"tokens": "n_tokens", "image_tokens": "n_image_tokens", "images": "n_images"}
    names |= {"loss_tokens": "n_loss_tokens"}
    return {"packs": len(rows), **{name: sum(row[key] for row in rows) for name, key in names.items()}}


def _counts(
    rows: list[dict[str, int]], packing: Packing, cuts: Pieces, lengths: NDArray[np.int64]
) -> dict[str, Any]:
    found = totals(rows)
    separators = packing.tokens - int(cuts.lengths.sum())
    ledger.balance(
        "documents -> packs, in tokens",
        int(lengths.sum()) + separators,
        {"packed": found["tokens"], "too_long": cuts.dropped_tokens},
    )
    return {
        **found,
        "limit": packing.limit,
        "lower_bound": packing.lower_bound,
        "fill": round(packing.fill, 6),
        "split": cuts.split,
        "dropped": cuts.dropped,
        "dropped_tokens": cuts.dropped_tokens,
    }


def _report(facts: Mapping[str, Any], packing: Packing) -> None:
    log.info(
        "%d records: %d rejected, %d without a loss token, %d dropped as too long (%d tokens), %d split",
        facts["read"], sum(facts["rejected"].values()), facts["without_loss"],
        facts["dropped"], facts["dropped_tokens"], facts["split"],
    )  # fmt: skip
    log.info(
        "fill %.2f %%, %d packs more than the lower bound, %d loss tokens, %d pictures in %d patches",
        100 * facts["fill"], facts["packs"] - facts["lower_bound"], facts["loss_tokens"],
        facts["images"], facts["image_tokens"],
    )  # fmt: skip
    log.info("%s", packing.summary)
