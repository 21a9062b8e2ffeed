"""The index stage: chat records to packed shards in Megatron's indexed format.

    chat shards -> samples -> pieces of text and pictures -> documents -> packs -> .bin/.idx

Every record ends as packed or as rejected, in ``rejects.jsonl``, with a reason; every document longer
than a pack is split or dropped, and counted either way.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from plait.tokens.pack import Packing, Pieces, cut, pack
from plait.tokens.render import Renderer
from plait.tokens.roles import markup
from plait.tokens.templates import Piece

log = logging.getLogger(__name__)

BATCH, SIZE = 512, 1 << 22
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
        renderer.let_go()  # packing needs the room
        cuts = cut(documents.lengths, limit, form["overlong"])
        begins = documents.tokens_at(cuts.document, cuts.start) == renderer.separator
        packing = pack(cuts.lengths, limit, form["packing"], separators=~begins)
        if not len(packing):
            raise DataError(
                f"no document is left to pack: {len(documents)} were read, {cuts.dropped} are too long, "
                f"rejected are {rejected}, {records.others} are of the dataset's other part",
                hint=split.EMPTY if records.others else "look at the ledgers of the chat shards",
            )
        totals = PackWriter(folder, renderer, form).write(Packs(documents, cuts, packing, renderer.separator))
        origins.write(folder, cuts, packing)
        facts = {
            **_counts(totals, packing, cuts, documents.lengths),
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
        for batch in batches(_pieces(renderer, records, rejected), _size, most=BATCH, largest=SIZE):
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


def _counts(
    totals: Mapping[str, int], packing: Packing, cuts: Pieces, lengths: NDArray[np.int32]
) -> dict[str, Any]:
    separators = packing.tokens - int(cuts.lengths.sum())
    ledger.balance(
        "documents -> packs, in tokens",
        int(lengths.sum()) + separators,
        {"packed": totals["tokens"], "too_long": cuts.dropped_tokens},
    )
    return {
        **totals,
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
