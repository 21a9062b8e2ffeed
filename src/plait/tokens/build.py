"""The index stage: chat records to packed shards in Megatron's indexed format.

    chat shards -> samples -> pieces of text and pictures -> documents -> packs -> .bin/.idx

Every record ends as packed or as rejected, in ``rejects.jsonl``, with a reason; every document longer
than a pack is split or dropped, and counted either way.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from plait import files, layout
from plait.data import chat, ledger, said, split
from plait.data.batches import batches
from plait.data.lines import read_lines
from plait.data.prints import Prints, Seen, rows
from plait.data.rejects import NAME, Record, Rejects, to_json
from plait.errors import DataError, RecordError
from plait.progress import bar
from plait.tokens import indexed
from plait.tokens.documents import Batch, Documents
from plait.tokens.laid import Packs, PackWriter
from plait.tokens.lineage import Origins
from plait.tokens.made_by import made_by
from plait.tokens.pack import Packing, Pieces, cut, pack, summary
from plait.tokens.render import Renderer
from plait.tokens.roles import markup
from plait.tokens.templates import Piece

T = TypeVar("T")
log = logging.getLogger(__name__)

BATCH, SIZE = 512, 1 << 22
"""Conversations tokenised at once, and their characters and bytes of pictures: little enough for memory."""
WINDOW = 1024
"""Batches that are packed jointly: more would not fill packs better, and memory holds where documents lie."""


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
    renderer, records, sums = Renderer(tokenizer, form), Records(chats, taken or {}), Sums(limit)
    dtype = indexed.text_dtype(renderer.facts["vocab_size"])
    with (
        Prints(folder) as prints,
        Origins(folder) as origins,
        PackWriter(folder, renderer, form, dtype) as writer,
        (folder / NAME).open("wb") as out,
    ):
        rejected = Rejects(out)
        pieces = _pieces(renderer, records, rejected)
        for window in _windows(batches(pieces, _size, most=BATCH, largest=SIZE)):
            with Documents(dtype) as documents:
                without_loss = _collect(documents, origins, prints, renderer, window, rejected, form)
                renderer.let_go()  # packing needs the room
                cuts = cut(documents.lengths, limit, form["overlong"])
                begins = documents.tokens_at(cuts.document, cuts.start) == renderer.separator
                packing = pack(cuts.lengths, limit, form["packing"], separators=~begins)
                writer.write(Packs(documents, cuts, packing, renderer.separator))
                origins.write(cuts, packing)
                sums.add(documents.lengths, cuts, packing, begins)
                sums.counts["without_loss"] += without_loss
    _check(sums.counts, rejected, records, form["reject_limit"])
    facts = {
        **sums.facts(writer.totals),
        "read": sums.counts["documents"] + rejected.count,
        "rejected": to_json(rejected.reasons),
        "other_part": records.others,
        "duplicates": records.duplicates,
        **made_by(renderer.folder, form["template"], renderer.vocabulary),
        **{key: renderer.facts[key] for key in ("vocab_size", "bos_id", "eos_id", "vision")},
        **{key: form[key] for key in ("patch_size", "max_resolution")},
    }
    files.write_json(folder / "data_stats.json", facts)
    _report(facts, sums)
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


def _windows(found: Iterator[T]) -> Iterator[Iterator[T]]:
    """Each WINDOW of what is found, to be read before the next."""
    for first in found:
        yield chain([first], islice(found, WINDOW - 1))


def _collect(
    documents: Documents,
    origins: Origins,
    prints: Prints,
    renderer: Renderer,
    window: Iterable[Sequence[tuple["Read", list[Piece]]]],
    rejected: Rejects,
    form: Mapping[str, Any],
) -> int:
    """Take in every record that teaches something; reject the others, and count those without loss.

    Where the format's ``no_loss`` is ``count``, a document that no assistant speaks in is kept: a run may
    train what others say.
    """
    without_loss = 0
    for batch in window:
        found = renderer.documents([pieces for _, pieces in batch])
        words = _words(found, renderer.vision)
        taught = found.trained(renderer.vision)
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
        documents.extend(found, kept)
        taken = [batch[number][0] for number in kept]
        samples = [(one.sample, one.name) for one in taken]
        prints.extend(rows(samples, [one.row for one in taken]), [one.name for one in taken])
    return without_loss


def _check(counts: Mapping[str, int], rejected: Rejects, records: "Records", limit: float) -> None:
    """Refuse a shard of which too much is rejected, or nothing is left.

    Raises:
        DataError: it is such a shard.
    """
    rejected.check(
        counts["documents"] + rejected.count,
        limit,
        ", ".join(map(str, records.chats)),
        "mend the source, name another template, or raise `reject_limit` of the format in config/",
    )
    if not counts["packs"]:
        raise DataError(
            f"no document is left to pack: {counts['documents']} were read, "
            f"{counts['dropped']} are too long, "
            f"rejected are {to_json(rejected.reasons)}, "
            f"{records.others} are of the dataset's other part",
            hint=split.EMPTY if records.others else "look at the ledgers of the chat shards",
        )


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

    def __iter__(self) -> Iterator["Read"]:
        """Each record of the part.

        Raises:
            DataError: a line is no record, or what stands beside them is of others.
        """
        for path in self.chats:
            beside, dataset = said.Reader(path), _dataset(path)
            for number, line in bar(read_lines(path), path.name, " records"):
                try:
                    sample = chat.parse(line)
                except RecordError as error:
                    raise DataError(
                        f"{path} line {number}: {error}",
                        hint="`plait chat` makes such files and rejects such lines",
                    ) from error
                row = beside.of(line)
                if split.takes(self.taken.get("by_hash"), sample.id):
                    name = f"{dataset}/{sample.id}" if sample.id else ""
                    yield Read(Record(path, number, sample.id), sample, name, row)
                else:
                    self.others += 1
            beside.end()

    def once(self, rejected: Rejects) -> Iterator["Read"]:
        """Each record but those whose id came before, and equal ones where ``duplicates`` rejects them."""
        with Seen() as seen:
            for read in self:
                record, sample, name, row = read
                first = seen.before(name.encode(), record) if name else None
                if first is not None:
                    rejected.add(record, "duplicate_id", f"{first} has the same id")
                    continue
                found = row[said.DIGEST] if row else said.digest(sample)
                first = seen.before(found, record)
                self.duplicates += first is not None
                if first is not None and self.taken.get("duplicates") == "reject":
                    rejected.add(record, "duplicate", f"{first} says the same")
                    continue
                yield read


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


def _size(one: tuple[Read, list[Piece]]) -> int:
    """Characters and bytes of pictures."""
    return sum([len(p.content if isinstance(p.content, str) else p.content.encoded) for p in one[1]])


# Figures


@dataclass
class Sums:
    """What a shard has, counted one window of documents after another.

    Attributes:
        limit: tokens of a pack.
        counts: of documents, of the pieces that they were cut into, and of packs.
        room: of a pack, as :class:`plait.tokens.pack.Packing` has it.
        own_separators: whether every document begins with a separator.
    """

    limit: int
    counts: Counter[str] = field(default_factory=Counter)
    room: int = 0
    own_separators: bool = True

    def add(
        self, lengths: NDArray[np.int32], cuts: Pieces, packing: Packing, begins: NDArray[np.bool_]
    ) -> None:
        """Count a window.

        Args:
            lengths: tokens of its documents.
            cuts: what they were cut into.
            packing: how these are packed.
            begins: which of them begin with a separator.
        """
        self.counts.update(
            documents=len(lengths),
            document_tokens=int(lengths.sum(dtype=np.int64)),
            pieces=len(packing.order),
            piece_tokens=int(cuts.lengths.sum(dtype=np.int64)),
            cost=packing.cost,
            packs=len(packing),
            tokens=packing.tokens,
            **{key: getattr(cuts, key) for key in CUTS},
        )
        self.room = max(self.room, packing.room)
        self.own_separators &= bool(begins[cuts.start == 0].all())

    def facts(self, totals: Mapping[str, int]) -> dict[str, Any]:
        """The facts of the shard, with what its rows sum up to."""
        found = self.counts
        separators = found["tokens"] - found["piece_tokens"]
        ledger.balance(
            "documents -> packs, in tokens",
            found["document_tokens"] + separators,
            {"packed": totals["tokens"], "too_long": found["dropped_tokens"]},
        )
        return {
            **totals,
            "limit": self.limit,
            "lower_bound": -(-found["cost"] // self.room),
            "fill": round(found["tokens"] / (found["packs"] * self.limit), 6),
            **{key: found[key] for key in CUTS},
            "documents": found["documents"] - found["dropped"],
            "without_loss": found["without_loss"],
            "own_separators": self.own_separators,
        }


CUTS = ("split", "dropped", "dropped_tokens")


def _report(facts: Mapping[str, Any], sums: Sums) -> None:
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
    log.info("%s", summary(*(sums.counts[key] for key in ("pieces", "packs", "tokens"))))
