"""What shapes are made of, and what they say of records that are not of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import RecordError

Record = Mapping[str, Any]
Encoded = Sequence[bytes | None]
"""A record's pictures in the order of :attr:`Shape.names`; None is one that is missing."""


@dataclass(frozen=True)
class Shape:
    """How records of one shape are read.

    Attributes:
        read: a record and its pictures, as a conversation. Raises RecordError.
        names: the names of a record's pictures, or what Hugging Face `datasets` has for one, with its bytes;
            None: its records name no pictures.
        holds: what the records are in: files of ``records``, ``tars`` of samples, or ``classes``, which are
            folders or tars of pictures.
        inside: the name in a file of JSON of the list that they are; empty: they are the values of an
            object; None: the file is a list.
        skips: whether a record can be read without a picture of its own.
        rule: raises LeftOut for a record that is left out, whether its pictures are there or not.
    """

    read: Callable[[Any, Encoded], Sample]
    names: Callable[[Any], Sequence[Any]] | None = None
    holds: str = "records"
    inside: str | None = None
    skips: bool = False
    rule: Callable[[Any], None] | None = None


def one_of(*names: str) -> Callable[[Any], Sequence[Any]]:
    """The names of pictures under the first of some keys that a record has; one or a list of them."""

    def found(record: Any) -> Sequence[Any]:
        known: Record = record if isinstance(record, Mapping) else {}
        value: Any = next((known[name] for name in names if known.get(name) is not None), [])
        return value if isinstance(value, list) else [value]

    return found


def field(record: Any, name: str) -> Any:
    """A value of a record.

    Raises:
        RecordError: it is no record, or has no such key.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"the record is no object but {str(record)[:40]!r}", reason="not_a_record")
    if name not in record:
        keys = ", ".join(sorted(map(str, record))[:8])
        raise RecordError(f"the record has no {name!r}, only {keys}", reason="missing_field")
    return record[name]


def text(record: Any, name: str) -> str:
    """A text of a record.

    Raises:
        RecordError: it has none, or something else in its place.
    """
    found = field(record, name)
    if not isinstance(found, str):
        raise RecordError(f"{name} is {str(found)[:40]!r}, not a text", reason="not_text")
    return found


def texts(record: Any, name: str) -> list[str]:
    """A list of texts of a record.

    Raises:
        RecordError: it has none, or something else in its place.
    """
    found = field(record, name)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise RecordError(f"{name} is {str(found)[:40]!r}, not a list of texts", reason="not_text")
    return found


def said(role: str, *parts: str | bytes) -> Message:
    """A turn; texts with nothing in them are left out."""
    made = (Picture(one) if isinstance(one, bytes) else Text(one) for one in parts if one)
    return Message(role, tuple(made))


def shown(pictures: Encoded) -> list[bytes]:
    """The pictures of a record that is about some.

    Raises:
        RecordError: it names none.
    """
    found = [one for one in pictures if one is not None]
    if not found:
        raise RecordError("the record names no picture", reason="missing_picture")
    return found


def exchanges(pairs: Sequence[tuple[str, str]], pictures: Sequence[bytes] = ()) -> Sample:
    r"""Questions and their answers; pictures stand before the first question, a line break between.

    Raises:
        RecordError: there is none.
    """
    if not pairs:
        raise RecordError("the record has no question", reason="no_messages")
    turns: list[Message] = []
    for number, (question, answer) in enumerate(pairs):
        first = pictures if not number else ()
        asked = f"\n{question}" if first and question else question
        turns += [said("user", *first, asked), said("assistant", answer)]
    return Sample(tuple(turns))
