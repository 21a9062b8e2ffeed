"""Documents of text: one turn of the assistant each, with nothing before it, as SOLO reads them.

SlimPajama-627B: ``{"text", "meta": {"redpajama_set_name"}}`` in .jsonl.zst. C4: ``{"text", "timestamp",
"url"}`` in .json.gz, or parquet.
"""

from collections.abc import Collection
from typing import Any

from plait.data.chat import Sample
from plait.data.shapes.common import Encoded, Shape, field, said, text
from plait.errors import LeftOut


def document(record: Any, _pictures: Encoded) -> Sample:
    """The ``text`` of a record."""
    return Sample((said("assistant", text(record, "text")),))


def slimpajama(leave_out: Collection[str]) -> Shape:
    """Documents of SlimPajama, but for those of some corpora."""

    def read(record: Any, pictures: Encoded) -> Sample:
        corpus = text(field(record, "meta"), "redpajama_set_name")
        if corpus in leave_out:
            raise LeftOut(f"it is of {corpus}", reason=corpus)
        return document(record, pictures)

    return Shape(read)
