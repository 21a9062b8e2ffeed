r"""Templates: how a conversation becomes text, and whose each piece of the text is.

=========  ==================================================  ==================================
name       text of one exchange                                trained
=========  ==================================================  ==================================
pretrain   the parts, without any markup, no BOS, no EOS       the assistant's parts
chatml     ``<|im_start|>{role}\n{content}<|im_end|>\n``       the assistant's turn, with markup
mistral    ``<s>[INST] {user} [/INST] {assistant}</s>``        the assistant's content and EOS
llama2     ``<s>[INST] <<SYS>>...{user} [/INST] {assistant} </s>``  likewise
llava      ``<s>[INST] {user}[/INST] {assistant}</s>``         likewise; Mistral v0.3, with pictures
jp_alpaca  ``<s>{header}\n\n### 指示:\n{user}\n\n### 応答:\n{assistant}</s>``  likewise; LLaVA-JP
tokenizer  what the tokenizer's own chat_template writes       see ``plait.tokens.jinja``
=========  ==================================================  ==================================

Every template but ``pretrain`` is also a Jinja text, which an exported tokenizer carries: its
``apply_chat_template`` gives the ids of training, because both tokenise one and the same text, whole,
with special tokens matched wherever they are written - also where a user wrote them. ``pretrain``
tokenises each text by itself and takes special tokens in it for plain text.

A picture stands in the Jinja text as ``<vision></vision>``, and in the text that is tokenised as
``<vision>``, its patches row by row, ``</vision>`` (``vocabulary.picture_text``). LLaVA's two write
``<image>``, which then stands once for every feature of the picture.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import RecordError
from plait.tokens.roles import ASSISTANT, CODES, SYSTEM, USER
from plait.tokens.vocabulary import IMAGE, PICTURE, TURN_END, TURN_START

HEADER = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
"""What an Alpaca prompt begins with in Japanese (LLM-jp); a system turn stands in its place."""


class Piece(NamedTuple):
    """A text or a picture of a conversation, and the code of the role it counts for."""

    content: str | Picture
    role: int


@dataclass(frozen=True, slots=True)
class Marks:
    """The tokenizer's own tokens that a template writes."""

    bos: str
    eos: str


@dataclass(frozen=True, slots=True)
class Template:
    """A way to write a conversation."""

    pieces: Callable[[Sample, Marks], Iterator[Piece]]
    jinja: str | None = None
    pictures: str = ""
    """What is written for a picture; empty where none can be."""
    whole: bool = True
    """Whether the text is tokenised as a whole; else each piece by itself, and special tokens in
    it are plain text."""


def chat_template(name: str, picture: str = IMAGE) -> str | None:
    """The Jinja text of a template; None where it has none, or where the tokenizer brings its own.

    Args:
        name: the template's.
        picture: the name of LLaVA's token for a picture.
    """
    jinja = TEMPLATES[name].jinja if name in TEMPLATES else None
    quoted = picture.replace("\\", r"\\").replace("'", r"\'")
    return jinja and jinja.replace(f"'{IMAGE}'", f"'{quoted}'")


def content(message: Message) -> list[str | Picture]:
    """The parts of a turn."""
    return [part.text if isinstance(part, Text) else part for part in message.parts]


def words(message: Message) -> str:
    """The text of a turn without pictures."""
    return "".join(part.text for part in message.parts if isinstance(part, Text))


# How each is written


def _pretrain(sample: Sample, marks: Marks) -> Iterator[Piece]:  # noqa: ARG001
    for message in sample.messages:
        role = CODES[message.role]
        for part in message.parts:
            yield Piece(part.text if isinstance(part, Text) else part, role)


def _chatml(sample: Sample, marks: Marks) -> Iterator[Piece]:  # noqa: ARG001
    for message in sample.messages:
        role = CODES[message.role]
        yield Piece(f"{TURN_START}{message.role}\n", role)
        yield from (Piece(part, role) for part in content(message))
        yield Piece(f"{TURN_END}\n", role)


def _mistral(sample: Sample, marks: Marks) -> Iterator[Piece]:
    yield Piece(marks.bos, USER)
    for system, message in _with_system(sample):
        if message.role == "user":
            yield Piece("[INST] ", USER)
            yield Piece(f"{words(system)}\n\n" if system else "", SYSTEM)
            yield Piece(f"{words(message)} [/INST]", USER)
        else:
            yield Piece(f" {words(message)}{marks.eos}", ASSISTANT)


def _llama2(sample: Sample, marks: Marks) -> Iterator[Piece]:
    for system, message in _with_system(sample):
        if message.role == "user":
            yield Piece(f"{marks.bos}[INST] ", USER)
            yield Piece(f"<<SYS>>\n{words(system)}\n<</SYS>>\n\n" if system else "", SYSTEM)
            yield Piece(f"{words(message).strip()} [/INST]", USER)
        else:
            yield Piece(f" {words(message).strip()} {marks.eos}", ASSISTANT)


def _llava(sample: Sample, marks: Marks) -> Iterator[Piece]:
    yield Piece(marks.bos, USER)
    for system, message in _with_system(sample):
        if message.role == "user":
            yield Piece("[INST] ", USER)
            yield Piece(f"{words(system)}\n\n" if system else "", SYSTEM)
            yield from (Piece(part, USER) for part in content(message))
            yield Piece("[/INST]", USER)
        else:
            yield Piece(f" {words(message)}{marks.eos}", ASSISTANT)


def _jp_alpaca(sample: Sample, marks: Marks) -> Iterator[Piece]:
    first, *rest = sample.messages
    has_system = first.role == "system"
    yield Piece(marks.bos, USER)
    yield Piece(f"{words(first) if has_system else HEADER}\n\n", SYSTEM)
    for message in rest if has_system else sample.messages:
        if message.role == "system":
            raise RecordError("a system turn is not the first", reason="system_not_first")
        if message.role == "user":
            yield Piece("### 指示:\n", USER)
            yield from (Piece(part, USER) for part in content(message))
            yield Piece("\n\n### 応答:\n", USER)
        else:
            yield Piece(f"{words(message)}{marks.eos}", ASSISTANT)


def _with_system(sample: Sample) -> Iterator[tuple[Message | None, Message]]:
    """Each user's and assistant's turn, with the system turn directly before it, if any.

    Raises:
        RecordError: a system turn stands before none, or before an assistant's.
    """
    system: Message | None = None
    for message in sample.messages:
        if message.role == "system" and system is None:
            system = message
            continue
        if system and message.role != "user":
            break
        yield system, message
        system = None
    if system:
        raise RecordError("a system turn is not followed by a user's", reason="system_without_user")


# The same in Jinja. ``text`` takes a string or a list of parts.


def _text(picture: str) -> str:
    return (
        "{%- macro text(content) -%}{%- if content is string -%}{{ content }}"
        "{%- else -%}{%- for part in content -%}"
        "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ '" + picture + "' }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}\n"
    )


_CHATML = (
    _text(PICTURE) + "{%- for message in messages -%}\n"
    "{{ '"
    + TURN_START
    + "' + message['role'] + '\\n' + text(message['content']) + '"
    + TURN_END
    + "\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '" + TURN_START + "assistant\\n' }}{%- endif -%}\n"
)

_WITH_SYSTEM = (
    "{%- set ns = namespace(system=none) -%}\n"
    "BEGIN{%- for message in messages -%}\n"
    "{%- if message['role'] == 'system' and ns.system is none -%}"
    "{%- set ns.system = text(message['content']) -%}\n"
    "{%- elif ns.system is not none and message['role'] != 'user' -%}"
    "{{ raise_exception('a system turn is not followed by a user\\'s') }}\n"
    "{%- elif message['role'] == 'user' -%}"
    "{{ OPEN + '[INST] ' }}{%- if ns.system is not none -%}{{ SYSTEM }}{%- endif -%}"
    "{{ USER + 'CLOSE' }}{%- set ns.system = none -%}\n"
    "{%- else -%}{{ ' ' + ASSISTANT + eos_token }}\n"
    "{%- endif -%}{%- endfor -%}\n"
    "{%- if ns.system is not none -%}"
    "{{ raise_exception('a system turn is not followed by a user\\'s') }}{%- endif -%}\n"
)


_JP_ALPACA = (
    _text(IMAGE) + "{{ bos_token }}{%- for message in messages -%}\n"
    "{%- if loop.first -%}"
    "{{ (text(message['content']) if message['role'] == 'system' else HEADER) + '\\n\\n' }}{%- endif -%}\n"
    "{%- if message['role'] == 'user' -%}"
    "{{ '### 指示:\\n' + text(message['content']) + '\\n\\n### 応答:\\n' }}\n"
    "{%- elif message['role'] == 'assistant' -%}{{ text(message['content']) + eos_token }}\n"
    "{%- elif not loop.first -%}{{ raise_exception('a system turn is not the first') }}\n"
    "{%- endif -%}{%- endfor -%}\n"
)


def _filled(picture: str = PICTURE, **parts: str) -> str:
    """The Jinja text of mistral, llama2 or llava: the places in capitals are filled in."""
    text = _text(picture) + _WITH_SYSTEM
    for name, part in parts.items():
        text = text.replace(name, part)
    return text


TEMPLATES: dict[str, Template] = {
    "pretrain": Template(_pretrain, pictures=PICTURE, whole=False),
    "chatml": Template(_chatml, _CHATML, pictures=PICTURE),
    "mistral": Template(
        _mistral,
        _filled(
            BEGIN="{{ bos_token }}",
            OPEN="''",
            SYSTEM="ns.system + '\\n\\n'",
            USER="text(message['content'])",
            CLOSE=" [/INST]",
            ASSISTANT="text(message['content'])",
        ),
    ),
    "llava": Template(
        _llava,
        _filled(
            IMAGE,
            BEGIN="{{ bos_token }}",
            OPEN="''",
            SYSTEM="ns.system + '\\n\\n'",
            USER="text(message['content'])",
            CLOSE="[/INST]",
            ASSISTANT="text(message['content'])",
        ),
        pictures=IMAGE,
    ),
    "jp_alpaca": Template(_jp_alpaca, _JP_ALPACA.replace("HEADER", f"'{HEADER}'"), pictures=IMAGE),
    "llama2": Template(
        _llama2,
        _filled(
            BEGIN="",
            OPEN="bos_token",
            SYSTEM="'<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n'",
            USER="text(message['content']).strip()",
            CLOSE=" [/INST]",
            ASSISTANT="text(message['content']).strip() + ' '",
        ),
    ),
}
