"""One conversation: what a line of chat jsonl may look like, and the one form it is written in.

A line may hold ``{"messages": [...]}``, ``{"conversations": [...]}``, a bare list of messages or a
bare message. A message has ``role`` and ``content``, or ShareGPT's ``from`` and ``value``. Content
is a string or a list of parts. The form that is written (``config/chat.schema.json``):

    {"id": "...", "source": {"file": "talks.jsonl", "line": 12}, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
        {"type": "text", "text": "..."}]}]}

Written are no empty texts and no empty system messages; other keys than these are not kept. ``source`` is
the line of the raw source, which a shard of records sets whatever the raw line says.

>>> parse(b'{"role": "assistant", "content": "Hello"}').to_line("toy-1")
b'{"id":"toy-1","messages":[{"role":"assistant","content":[{"type":"text","text":"Hello"}]}]}'
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import orjson
from msgspec import Meta, Struct
from msgspec.structs import asdict, replace

from plait import layout
from plait.data import images
from plait.errors import RecordError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
SAMPLES, BYTES = 64, 4_000_000
"""Samples that are looked at at once, and bytes of their pictures: little enough for memory."""
LAST = (1 << 63) - 1
"""The greatest number of a line that is one: indices keep 64 bits."""
SPEAKERS = {name: name for name in ROLES} | {"human": "user", "gpt": "assistant"}
"""Whose turn ShareGPT's ``from`` says it is."""


class Text(Struct, frozen=True, gc=False, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A piece of text, never empty."""

    text: Annotated[str, Meta(min_length=1)]

    def to_json(self) -> dict[str, Any]:
        """The part as it is written."""
        return {"type": "text", "text": self.text}


EMPTY = Text("")


class Picture(Struct, frozen=True, gc=False):
    """A picture file's bytes."""

    encoded: bytes

    def to_json(self) -> dict[str, Any]:
        """The part as it is written, with the bytes in base64."""
        url = orjson.Fragment(images.url_json(self.encoded))
        return {"type": "image_url", "image_url": {"url": url}}


Part = Text | Picture


class Message(Struct, frozen=True, gc=False):
    """One turn."""

    role: str
    parts: tuple[Part, ...]

    @property
    def says_something(self) -> bool:
        """Whether there is a picture, or text other than white space."""
        for part in self.parts:  # noqa: SIM110 - half the time of a generator, for each turn of all data
            if isinstance(part, Picture) or not part.text.isspace():
                return True
        return False


class Source(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A line of a raw source: its file, relative to the source's folder, and its number from 1."""

    file: str
    line: Annotated[int, Meta(gt=0, le=LAST)]

    def path(self, records: Path) -> str:
        """The file's path, if the chat records of ``records`` lie in a dataset's folder; else its name."""
        return _raw_path(self.file, records)


@lru_cache(maxsize=64)
def _raw_path(file: str, records: Path) -> str:
    """Many records come from one file."""
    shard = layout.Chat.read(layout.inside(records))
    return f"{layout.Raw(dataset=shard.dataset)}/{file}" if shard else file


class Sample(Struct, frozen=True, gc=False):
    """One conversation; ``id`` is empty and ``source`` None where the line had none."""

    messages: tuple[Message, ...]
    id: str = ""
    source: Source | None = None

    @property
    def pictures(self) -> list[bytes]:
        """The encoded pictures, in order of appearance."""
        return [part.encoded for m in self.messages for part in m.parts if isinstance(part, Picture)]

    def with_pictures(self, change: Callable[[bytes], bytes]) -> "Sample":
        """The same conversation with every picture file changed."""

        def changed(part: Part) -> Part:
            return Picture(change(part.encoded)) if isinstance(part, Picture) else part

        messages = (replace(m, parts=tuple(map(changed, m.parts))) for m in self.messages)
        return replace(self, messages=tuple(messages))

    def to_line(self, id_: str = "") -> bytes:
        """The conversation as it is written, without a line end; ``id_`` is used if it has none.

        Raises:
            RecordError: a text of it is not Unicode: it has half a surrogate pair.
        """
        messages = [
            {"role": message.role, "content": [part.to_json() for part in message.parts]}
            for message in self.messages
        ]
        source = {"source": asdict(self.source)} if self.source else {}
        try:
            return orjson.dumps({"id": self.id or id_, **source, "messages": messages})
        except orjson.JSONEncodeError as error:
            raise RecordError(f"a text cannot be written in UTF-8: {error}", reason="not_text") from error


def parse(line: bytes | str) -> Sample:
    """Read one line. Pictures are unpacked from base64; whether they decode is for images to say.

    Raises:
        RecordError: the line is malformed; its ``reason`` is one of bad_json, not_a_record,
            no_messages, unknown_role, unknown_part, not_text, not_base64, empty_text.
    """
    try:
        found = _read_text(line)
    except (msgspec.DecodeError, UnicodeError):
        return _of_any_shape(line)  # it has pictures, or is another's, or what is wrong with it is to be said
    spoken = tuple([Message(turn.role, turn.content) for turn in found.messages])
    _check_words(spoken)
    return Sample(spoken, found.id, found.source)


class _Turn(Struct, gc=False, forbid_unknown_fields=True):
    role: Role
    content: Annotated[tuple[Text, ...], Meta(min_length=1)]


class _Talk(Struct, gc=False, forbid_unknown_fields=True):
    """A line without pictures as it is written: half the time of any other, and text is many short lines."""

    messages: Annotated[tuple[_Turn, ...], Meta(min_length=1)]
    id: str = ""
    source: Source | None = None


_read_text = msgspec.json.Decoder(_Talk).decode


def _of_any_shape(line: bytes | str) -> Sample:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error}", reason="bad_json") from error
    id_, turns = _turns(value)
    if not turns:
        raise RecordError("the conversation has no messages", reason="no_messages")
    messages = [_message(turn, f"message {number}") for number, turn in enumerate(turns)]
    spoken = tuple([message for message in messages if message.parts or message.role != "system"])
    _check_words(spoken)
    return Sample(messages=spoken, id=id_, source=_source(value))


def _turns(value: Any) -> tuple[str, list[Any]]:
    """The id and the list of messages of any of the accepted shapes."""
    if isinstance(value, list):
        return "", value
    if not isinstance(value, dict):
        raise RecordError(f"expected an object or a list, found {_kind(value)}", reason="not_a_record")
    found = [value[key] for key in ("messages", "conversations") if key in value]
    if not found and value.keys() & {"role", "from"}:
        return _id(value), [value]
    if len(found) != 1 or not isinstance(found[0], list):
        keys = ", ".join(sorted(value)[:8])
        sentence = f"expected one list under `messages` or `conversations`; the object has: {keys}"
        raise RecordError(sentence, reason="not_a_record")
    return _id(value), found[0]


def _id(value: dict[str, Any]) -> str:
    found = value.get("id", "")
    return str(found) if isinstance(found, str | int) else ""


def _source(value: Any) -> Source | None:
    """The raw line that a record names; a key of that name with anything else in it is a stranger's."""
    found = value.get("source") if isinstance(value, dict) else None
    if not isinstance(found, dict) or len(found) != 2:
        return None
    file, line = found.get("file"), found.get("line")
    return Source(file, line) if isinstance(file, str) and type(line) is int and 0 < line <= LAST else None


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} is {_kind(turn)}, not an object", reason="not_a_record")
    role = turn["role"] if "role" in turn else SPEAKERS.get(str(turn.get("from")), turn.get("from"))
    if role not in ROLES:
        sentence = f"{where} has role {str(role)[:40]!r}, expected {', '.join(ROLES)}"
        raise RecordError(sentence, reason="unknown_role")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RecordError(f"{where} has {_kind(content)} as content, not text or parts", reason="not_text")
    parts = [_part(part, where, number) for number, part in enumerate(content)]
    return Message(role=role, parts=tuple([part for part in parts if part is not EMPTY]))


def _part(part: Any, message: str, number: int) -> Part:
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"]) if part["text"] else EMPTY
    where = f"{message}, part {number}"
    if kind == "text":
        raise RecordError(f"{where} has {_kind(part.get('text'))} as text", reason="not_text")
    if kind == "image_url":
        address = part.get("image_url")
        url = address.get("url") if isinstance(address, dict) else address
        if not isinstance(url, str):
            raise RecordError(f"{where} has no image_url.url", reason="not_base64")
        return Picture(images.from_url(url))
    raise RecordError(f"{where} is of type {str(kind)[:40]!r}, not text or image_url", reason="unknown_part")


def _check_words(messages: tuple[Message, ...]) -> None:
    """A turn that says nothing would teach a model to say nothing."""
    for number, message in enumerate(messages):
        if not message.says_something:
            raise RecordError(f"turn {number} ({message.role}) is empty", reason="empty_text")
    if not messages:
        raise RecordError("the conversation says nothing", reason="empty_text")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
