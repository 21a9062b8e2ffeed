"""A tokenizer's own chat_template: the text that transformers would write, and whose each piece is.

A template may do anything with a conversation, so it is run twice: once as it is, and once with a
mark in the place of every content. Filling the contents into the second must give the first; where
it does not (a template that cuts thoughts, say), the conversation is rejected, never guessed at.

Trained are the parts inside ``{% generation %}`` where the template has such; else each content of
the assistant and the special token after it, with the white space between them; BOS ends no turn.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plait.data.chat import Sample
from plait.errors import DataError, RecordError
from plait.files import read_json
from plait.layout import FAST
from plait.tokens.roles import ASSISTANT, CODES, USER
from plait.tokens.templates import Marks, Piece, Template, words

FILE = "chat_template.jinja"
MARK, BEGIN, END = "\ue000{}\ue001", "\ue002", "\ue003"
MARKS = re.compile("\ue000([0-9]+)\ue001|([\ue002\ue003])")


def own_template(folder: Path) -> Template:
    """The chat template of a tokenizer folder.

    Raises:
        DataError: it has none, or one that is not Jinja.
    """
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{folder} has no {FILE}", hint="name a template of plait in config: formats")
    source = path.read_text(encoding="utf-8")
    added = read_json(folder / FAST)["added_tokens"]
    tokens = {k: v for k, v in read_json(folder / "tokenizer_config.json").items() if k.endswith("_token")}
    names = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
    opens = names.get("bos_token") if names.get("bos_token") != names.get("eos_token") else None
    special = {token["content"].strip() for token in added if token["special"]} - {opens, ""}
    ends = sorted(special, key=lambda token: (-len(token), token))
    try:
        plain, marked = (_environment(marks=marks).from_string(source) for marks in (False, True))
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{path} is not Jinja: line {error.lineno}: {error.message}") from error
    write, write_marked = (partial(_write, template, names) for template in (plain, marked))
    return Template(partial(_pieces, write, write_marked, ends))


Write = Callable[[Sample, Sequence[str]], str]


def _write(template: jinja2.Template, names: dict[str, Any], sample: Sample, contents: Sequence[str]) -> str:
    turns = zip(sample.messages, contents, strict=True)
    messages = [{"role": message.role, "content": text} for message, text in turns]
    try:
        return template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False, **names
        )
    except jinja2.TemplateError as error:
        raise RecordError(f"chat_template refuses: {error}", reason="template_refuses") from error


def _pieces(
    write: Write, write_marked: Write, special: Sequence[str], sample: Sample, marks: Marks
) -> Iterator[Piece]:
    """Match both texts, then tell each piece's speaker."""
    del marks
    contents = [words(message) for message in sample.messages]
    text = write(sample, contents)
    marked = write_marked(sample, [MARK.format(number) for number in range(len(contents))])
    if [int(found[1]) for found in MARKS.finditer(marked) if found[1]] != list(range(len(contents))):
        raise RecordError("chat_template leaves a turn out or moves it", reason="template_drops_turns")
    for filled in (contents, [content.strip() for content in contents]):
        pieces = list(_told(marked, sample, filled, special))
        if "".join(str(piece.content) for piece in pieces) == text:
            return iter(pieces)
    raise RecordError("chat_template changes a content", reason="template_changes_content")


def _told(marked: str, sample: Sample, contents: list[str], special: Sequence[str]) -> Iterator[Piece]:
    """The pieces of a marked text; text between contents is of the next speaker, or not trained."""
    speakers = [CODES[message.role] for message in sample.messages]
    generation, inside, ended, turn = BEGIN in marked, False, False, 0
    for part, number, bracket in _parts(marked):
        if bracket:
            inside = bracket == BEGIN
        elif number:
            speaker = speakers[turn]
            trained = inside if generation else speaker == ASSISTANT
            yield Piece(contents[turn], ASSISTANT if trained else _prompt(speaker))
            ended, turn = trained and not generation, turn + 1
        else:
            stop = _stop(part, special) if ended else ""
            following = speakers[turn] if turn < len(speakers) else USER
            yield Piece(stop, ASSISTANT)
            yield Piece(part.removeprefix(stop), ASSISTANT if inside else _prompt(following))
            ended = False


def _stop(text: str, special: Sequence[str]) -> str:
    """The special token that a text begins with, white space before it included; else nothing."""
    bare = text.lstrip()
    token = next((s for s in special if bare.startswith(s)), "")
    return text[: len(text) - len(bare) + len(token)] if token else ""


def _parts(marked: str) -> Iterator[tuple[str, str, str]]:
    """Text, turn number or generation bracket, in order; the other two are empty."""
    end = 0
    for found in MARKS.finditer(marked):
        if found.start() > end:
            yield marked[end : found.start()], "", ""
        yield "", found[1] or "", found[2] or ""
        end = found.end()
    if end < len(marked):
        yield marked[end:], "", ""


def _prompt(speaker: int) -> int:
    return USER if speaker == ASSISTANT else speaker


# The environment of transformers' apply_chat_template


def _environment(*, marks: bool) -> ImmutableSandboxedEnvironment:
    generation = MarkedGeneration if marks else Generation
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _no_clock
    return environment


class Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` around what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so
    around = ("", "")

    def parse(self, parser: Parser) -> Node:
        """Call ``written`` on the body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

    def written(self, caller: Callable[[], str]) -> str:
        """The body, between marks if there are to be any."""
        return caller().join(self.around)


class MarkedGeneration(Generation):
    """The same, with marks around the body."""

    identifier = Generation.identifier
    around = (BEGIN, END)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _no_clock(form: str) -> NoReturn:
    raise DataError(
        f"the chat_template writes the date ({form!r}): its tokens would change from day to day",
        hint="edit the template, or name one of plait in config: formats",
    )
