"""A shape that is a Python file of the user's.

It has ``read(record, pictures)``, which gives a :class:`plait.data.chat.Sample`, or LLaVA's list of turns
``{"from", "value"}`` in which ``<image>`` stands for a picture, or None to leave the record out. With
``pictures(record)`` it names the pictures that are then given to ``read``. It may raise
:class:`plait.errors.RecordError` with a reason of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from plait.config.paths import local
from plait.data import webdataset
from plait.data.chat import Picture, Sample, Text
from plait.data.shapes.common import Encoded, Shape
from plait.errors import DataError, LeftOut, RecordError

MISTAKES = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, OSError,
    RuntimeError, EOFError, StopIteration,
)  # fmt: skip
"""What a reader raises at a record that is not as its author thought."""
UNFINISHED = (NameError, ImportError)
"""What a reader raises at every record."""
BROKEN = (*MISTAKES, *UNFINISHED, SyntaxError, SystemExit)
"""What a file raises that cannot be loaded."""


def shape(path: str) -> Shape:
    """The shape that a file has.

    Raises:
        DataError: it is not there, cannot be loaded, or has no ``read``.
    """
    found = _run(local(path))
    read, names = found.get("read"), found.get("pictures")
    if not callable(read) or not (names is None or callable(names)):
        raise DataError(
            f"{path} has no function `read`"
            if not callable(read)
            else f"`pictures` of {path} is no function",
            hint="read(record, pictures) gives a conversation, pictures(record) names its pictures",
        )
    return Shape(_guarded(read, path), _named(names, path) if names else None)


def _run(path: Path) -> dict[str, Any]:
    """The names of a file of Python."""
    if not path.is_file():
        raise DataError(f"{path} does not exist", hint="`shape` names a Python file with `read`")
    found: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), found)  # noqa: S102 - the user's own file
    except BROKEN as error:
        raise _unfinished(path, error) from error
    return found


def _guarded(read: Callable[..., Any], path: str) -> Callable[[Any, Encoded], Sample]:
    def guarded(record: Any, pictures: Encoded) -> Sample:
        shown = [one for one in pictures if one is not None]
        try:
            found = _sample(read(record, shown), shown, path)
            _check_parts(found)
        except UNFINISHED as error:
            raise _unfinished(path, error) from error
        except MISTAKES as error:
            raise _failed(path, "read", error) from error
        return found

    return guarded


def _sample(found: Any, shown: list[bytes], path: str) -> Sample:
    """What a reader gives, as a conversation."""
    if found is None:
        raise LeftOut(f"{path} leaves it out", reason="left_out")
    if isinstance(found, list):
        return replace(webdataset.conversation(found, shown, "record"), id="")
    if not isinstance(found, Sample):
        raise DataError(
            f"`read` of {path} gives {type(found).__name__}",
            hint="it gives a Sample of plait.data.chat, a list of turns {from, value}, or None",
        )
    return found


def _check_parts(sample: Sample) -> None:
    """A conversation is of texts that UTF-8 has and of pictures' bytes.

    Raises:
        TypeError, UnicodeEncodeError: it is not.
    """
    for part in (part for message in sample.messages for part in message.parts):
        if isinstance(part, Text):
            part.text.encode()
        elif not isinstance(part, Picture) or not isinstance(part.encoded, bytes):
            raise TypeError(f"a part of its Sample is {type(part).__name__}, neither Text nor Picture")


def _named(names: Callable[..., Any], path: str) -> Callable[[Any], list[Any]]:
    def named(record: Any) -> list[Any]:
        try:
            return list(names(record))
        except UNFINISHED as error:
            raise _unfinished(path, error) from error
        except MISTAKES as error:
            raise _failed(path, "pictures", error) from error

    return named


def _unfinished(path: str | Path, error: BaseException) -> DataError:
    sentence = f"{path} cannot be used: {type(error).__name__}: {error}"
    return DataError(sentence, hint=f"python {path} shows where, if it is not in a function")


def _failed(path: str, function: str, error: Exception) -> RecordError:
    sentence = f"`{function}` of {path} fails: {type(error).__name__}: {error}"
    return RecordError(sentence, reason="reader_failed")
