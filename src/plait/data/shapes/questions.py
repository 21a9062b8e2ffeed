"""Questions and answers about pictures.

LLaVA, ALLaVA-4V and LLaVAR: ``[{"id", "image", "conversations": [{"from", "value"}]}]``, where ``<image>``
stands for the picture. DVQA: ``[{"image", "question", "answer"}]``. FigureQA: ``{"qa_pairs": [{"image_index",
"question_string", "answer": 0 or 1}]}`` beside ``png/0.png``. OCR-VQA: ``{ID: {"imageURL", "questions",
"answers", "split"}}`` beside ``ID.jpg``, or parquet with ``image``. WebSight: parquet of ``image`` and
``text``, its HTML. The Cauldron: parquet of ``images`` and ``texts``, a list of ``{"user", "assistant"}``.
"""

from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from msgspec.structs import replace

from plait.data import webdataset
from plait.data.chat import Sample
from plait.data.shapes.common import Encoded, Shape, exchanges, field, one_of, said, shown, text, texts
from plait.errors import LeftOut, RecordError

YES_NO = {0: "No", 1: "Yes"}
"""FigureQA's answers."""


def conversation(record: Any, pictures: Encoded) -> Sample:
    """LLaVA's turns, with pictures where they say ``<image>``.

    Their ids are no names of records: LLaVA's lists have several talks under that of one picture.
    """
    turns = field(record, "conversations")
    if not isinstance(turns, list):
        raise RecordError("the record has no list of conversations", reason="not_a_record")
    there = [one for one in pictures if one is not None]
    return replace(webdataset.conversation(turns, there, str(record.get("id", "record"))), id="")


def dvqa(record: Any, pictures: Encoded) -> Sample:
    """One question about a chart."""
    return exchanges([(text(record, "question"), text(record, "answer"))], shown(pictures))


def figure_name(record: Any) -> Sequence[Any]:
    """The name of a figure follows from its number."""
    number = record.get("image_index") if isinstance(record, dict) else None
    return [f"png/{number}.png" if type(number) is int else None]


def figureqa(record: Any, pictures: Encoded) -> Sample:
    """One question about a figure, to which the answer is yes or no."""
    answer = field(record, "answer")
    if type(answer) is not int or answer not in YES_NO:
        raise RecordError(f"answer is {str(answer)[:40]!r}, not 0 or 1", reason="not_text")
    return exchanges([(text(record, "question_string"), YES_NO[answer])], shown(pictures))


def cover_name(record: Any) -> Sequence[Any]:
    """The picture of a book's cover: in the record, or named by its key and the ending of its address."""
    if not isinstance(record, dict) or "image" in record:
        return one_of("image")(record)
    try:
        path = urlsplit(str(record.get("imageURL", ""))).path
    except ValueError:  # it is no address
        path = ""
    return [f"{record.get('id')}{PurePosixPath(path).suffix or '.jpg'}"]


def ocr_vqa(splits: Collection[int]) -> Shape:
    """All questions about a cover as one conversation, if it is of one of the splits."""

    def rule(record: Any) -> None:
        split = record.get("split") if isinstance(record, dict) else None
        if split is not None and split not in splits:
            raise LeftOut(f"it is of split {split}", reason=f"split_{str(split)[:20]}")

    def read(record: Any, pictures: Encoded) -> Sample:
        asked, answered = texts(record, "questions"), texts(record, "answers")
        if len(asked) != len(answered):
            sentence = f"there are {len(asked)} questions and {len(answered)} answers"
            raise RecordError(sentence, reason="wrong_answers")
        return exchanges(list(zip(asked, answered, strict=True)), shown(pictures))

    return Shape(read, cover_name, inside="", rule=rule)


def websight(record: Any, pictures: Encoded) -> Sample:
    """A screenshot, and the HTML that draws it."""
    return Sample((said("user", *shown(pictures)), said("assistant", text(record, "text"))))


def cauldron(record: Any, pictures: Encoded) -> Sample:
    """Exchanges about one or more pictures."""
    turns = field(record, "texts")
    if not isinstance(turns, list):
        raise RecordError("texts is no list", reason="not_a_record")
    return exchanges([(text(turn, "user"), text(turn, "assistant")) for turn in turns], shown(pictures))


def question_answer(image: str, question: str, answer: str) -> Shape:
    """A question and an answer in columns of these names."""

    def read(record: Any, pictures: Encoded) -> Sample:
        given = field(record, answer)
        first = given[0] if isinstance(given, list) and given else given
        asked = text(record, question) if question else ""
        return exchanges([(asked, text({answer: first}, answer))], shown(pictures))

    return Shape(read, one_of(image))
