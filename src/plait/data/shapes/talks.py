"""Conversations of ShareGPT, OpenOrca, Capybara and CodeAct, by the rules that CodeActAgent cleans them by.

ShareGPT: ``{"id", "conversations": [{"from", "value"}]}``. OpenOrca: ``{"id", "system_prompt", "question",
"response"}``. Capybara and its sisters: ``{"source", "conversation": [{"input", "output"}]}``. CodeAct:
``{"id", "conversations": [{"role", "content"}]}``, which is a chat record.
"""

from itertools import pairwise
from typing import Any

import orjson

from plait.data import chat
from plait.data.chat import Sample
from plait.data.shapes.common import Encoded, Shape, exchanges, field, said, text
from plait.errors import LeftOut, RecordError

SPEAKERS = {
    "user": "user",
    "human": "user",
    "chatgpt": "assistant",
    "gpt": "assistant",
    "bard": "assistant",
    "system": "system",
    "bing": "user",
}
BING = "Bing Search Result:\n"
NOTICE = "This chat conversation is shared from"
CANCELLED = "Cancelled"


def record(found: Any, _pictures: Encoded) -> Sample:
    """A chat record, of whatever of its forms; what parquet has and JSON has not is nothing in it."""
    try:
        line = orjson.dumps(found, default=lambda _: None)
    except orjson.JSONEncodeError as error:
        raise RecordError(f"the record cannot be JSON: {error}", reason="not_a_record") from error
    return chat.parse(line)


def sharegpt(min_turns: int) -> Shape:
    """ShareGPT's conversations, cleaned, if they have so many turns."""

    def read(found: Any, _pictures: Encoded) -> Sample:
        turns = field(found, "conversations")
        if not isinstance(turns, list):
            raise RecordError("conversations is no list", reason="not_a_record")
        spoken = [one for one in map(_turn, turns) if not one[1].startswith(NOTICE)]
        _check_talk(spoken, min_turns)
        return Sample(tuple(said(role, words) for role, words in spoken))

    return Shape(read)


def _turn(turn: Any) -> tuple[str, str]:
    r"""Who says what; a search of Bing's is a user's turn, and ``\_`` an underscore."""
    speaker, words = text(turn, "from"), text(turn, "value")
    if speaker not in SPEAKERS:
        raise RecordError(f"a turn is from {speaker[:40]!r}", reason="unknown_role")
    return SPEAKERS[speaker], (BING if speaker == "bing" else "") + words.replace("\\_", "_")


def _check_talk(spoken: list[tuple[str, str]], min_turns: int) -> None:
    """Leave out what CodeActAgent does.

    Raises:
        LeftOut: a side never speaks, the assistant speaks first, one side speaks twice, a turn was cancelled,
            or there are too few turns.
    """
    roles = [role for role, _ in spoken]
    talked = [role for role in roles if role != "system"]
    rules = {
        "one_sided": not {"user", "assistant"} <= set(roles),
        "cancelled": any(words == CANCELLED for _, words in spoken),
        "assistant_first": roles[:1] == ["assistant"],
        "one_speaks_twice": any(one == other for one, other in pairwise(talked)),
        "too_few_turns": len(spoken) < min_turns,
    }
    if broken := [name for name, holds in rules.items() if holds]:
        raise LeftOut(f"the conversation is {broken[0]}", reason=broken[0])


def openorca(ids: str) -> Shape:
    """OpenOrca's records whose ids begin so: a system's turn, a question, a response."""

    def read(found: Any, _pictures: Encoded) -> Sample:
        if not text(found, "id").startswith(ids):
            raise LeftOut(f"its id does not begin with {ids}", reason="other_id")
        system = said("system", text(found, "system_prompt"))
        asked = exchanges([(text(found, "question"), text(found, "response"))])
        return Sample((*((system,) if system.parts else ()), *asked.messages))

    return Shape(read)


def capybara(found: Any, _pictures: Encoded) -> Sample:
    """Capybara's list of inputs and outputs."""
    turns = field(found, "conversation")
    if not isinstance(turns, list):
        raise RecordError("conversation is no list", reason="not_a_record")
    return exchanges([(text(turn, "input"), text(turn, "output")) for turn in turns])
