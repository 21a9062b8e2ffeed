import json
from pathlib import Path

import jsonschema
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from plait.data import chat, images
from plait.errors import RecordError

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000100000001080000000"
    "03a7e9b550000000a49444154789c63f80f00010101001bb6ee560000000049454e44ae426082"
)
SCHEMA = json.loads((Path(__file__).parents[2] / "config/chat.schema.json").read_text(encoding="utf-8"))
HELLO = chat.Sample(messages=(chat.Message("user", (chat.Text("Hello"),)),))


def line(value) -> bytes:
    return json.dumps(value).encode()


def user(content) -> dict:
    return {"role": "user", "content": content}


def samples() -> st.SearchStrategy[chat.Sample]:
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(chat.Text)
    part = text | st.just(chat.Picture(PNG))
    message = st.builds(
        chat.Message, st.sampled_from(chat.ROLES), st.lists(part, min_size=1, max_size=4).map(tuple)
    ).filter(lambda message: message.says_something)
    return st.builds(
        chat.Sample,
        messages=st.lists(message, min_size=1, max_size=4).map(tuple),
        id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    )


@given(samples())
def test_reading_what_was_written_is_the_identity(sample):
    assert chat.parse(sample.to_line()) == sample
    assert sample.pictures or chat._read_text(sample.to_line()), "the quick way reads what plait writes"


@given(samples())
def test_what_is_written_follows_the_published_schema(sample):
    jsonschema.validate(orjson.loads(sample.to_line()), SCHEMA)


KEYS = ("messages", "conversations", "role", "content", "from", "value", "type", "text", "image_url", "url")
WORDS = st.sampled_from(["user", "gpt", "text", "image_url"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | WORDS,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


def outcome(content: bytes) -> str:
    """The reason why a line is refused; "kept" if it is not."""
    try:
        chat.parse(content)
    except RecordError as error:
        return error.reason
    return "kept"


@given(ANYTHING)
def test_any_json_is_a_sample_or_a_record_error_with_a_reason(value):
    assert outcome(line(value))


SCRAPS = (
    '"', "\\ud800", "\\udc00", "\\u0000", "\\x", "\xff", "\x00", "\n", " ", "\t", ",", ":", "{}", "[]", '""',
    "null", "true", "NaN", "0", "-0", "01", "1.0", "1e3", "9" * 30, f"{chat.LAST}", f"{chat.LAST + 1}",
    "\ufeff", "\u3000", '"x":1,', '"id":3,', '"id":"b",', '"\\u0069d":"b",', '"source":null,', '"line":2,',
    '"line":2.0,', '"messages":[],', '"conversations":[],', '"role":"user",', '"role":"tool",',
    '"content":"b",', '"type":"text",', '"type":"image_url",', '"text":"b",', '"text":"",', '"text":" ",',
    '"url":"b",',
)  # fmt: skip


@given(samples(), st.sampled_from([None, chat.Source("a.jsonl", 7)]), st.data())
def test_a_line_as_it_is_written_is_read_as_one_of_any_shape_is(sample, source, data):
    written = replace(sample, source=source).to_line().decode()
    places = [place for place, letter in enumerate(written, 1) if letter in '{[,:"']
    for _ in range(data.draw(st.integers(0, 2))):
        first = data.draw(st.sampled_from(places))
        last = first + data.draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
        written = written[:first] + data.draw(st.sampled_from(SCRAPS)) + written[last:]
    content = written.encode("latin-1", "ignore") if data.draw(st.booleans()) else written.encode()
    assert read(chat.parse, content) == read(chat._of_any_shape, content)


def read(reader, content):
    """The sample, or why there is none."""
    try:
        return reader(content)
    except RecordError as error:
        return error.reason, str(error)


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [user("Hello")]},
        {"conversations": [user("Hello")]},
        [user("Hello")],
        user("Hello"),
        {"messages": [user([{"type": "text", "text": "Hello"}])]},
        {"conversations": [{"from": "human", "value": "Hello"}]},
        {"from": "human", "value": "Hello"},
        {"messages": [{"role": "system", "content": ""}, user("Hello")]},
    ],
)
def test_every_accepted_shape_says_the_same(value):
    assert chat.parse(line(value)) == HELLO


def test_sharegpt_speakers_become_roles():
    turns = [{"from": who, "value": who} for who in ("system", "human", "gpt", "user", "assistant")]
    found = chat.parse(line({"conversations": turns}))
    assert [message.role for message in found.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_a_picture_url_may_stand_without_an_object_and_its_media_type_is_corrected():
    url = json.loads(images.url_json(PNG)).replace("image/png", "image/jpeg")
    found = chat.parse(line(user([{"type": "image_url", "image_url": url}])))
    assert found.pictures == [PNG]
    assert b"data:image/png;base64," in found.to_line("x")


def test_a_number_is_an_id_and_a_missing_id_is_given():
    assert chat.parse(line({"id": 7, "messages": [user("Hello")]})).id == "7"
    assert orjson.loads(HELLO.to_line("toy-3"))["id"] == "toy-3"


def picture(url) -> dict:
    return user([{"type": "image_url", "image_url": {"url": url}}])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"messages": [', "bad_json"),
        (b'{"role": "user", "content": "\xff"}', "bad_json"),
        (b'{"role": "user", "content": "\\ud800"}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"3", "not_a_record"),
        (line({"text": "Hello"}), "not_a_record"),
        (line({"messages": [user("a")], "conversations": [user("b")]}), "not_a_record"),
        (line({"messages": "Hello"}), "not_a_record"),
        (line(["Hello"]), "not_a_record"),
        (b"[]", "no_messages"),
        (line({"role": "tool", "content": "x"}), "unknown_role"),
        (line({"role": ["user"], "content": "x"}), "unknown_role"),
        (line({"content": "x", "from": "bing"}), "unknown_role"),
        (line(user(None)), "not_text"),
        (line(user(3)), "not_text"),
        (line(user([{"type": "text"}])), "not_text"),
        (line(user([{"type": "audio"}])), "unknown_part"),
        (line(user(["Hello"])), "unknown_part"),
        (line(picture("https://example.org/base64,cat.png")), "not_base64"),
        (line(picture("data:image/png;base64")), "not_base64"),
        (line(picture("data:image/png;base64,a cat")), "not_base64"),
        (line(picture("data:image/png,QUJD")), "not_base64"),
        (line(picture(None)), "not_base64"),
        (line(user("")), "empty_text"),
        (line(user(" \n")), "empty_text"),
        (line(user([])), "empty_text"),
        (line([user("Hello"), {"role": "assistant", "content": ""}]), "empty_text"),
        (line({"role": "system", "content": ""}), "empty_text"),
    ],
)
def test_a_malformed_line_is_refused_with_a_reason(content, reason):
    with pytest.raises(RecordError) as caught:
        chat.parse(content)
    assert caught.value.reason == reason
    assert str(caught.value)
