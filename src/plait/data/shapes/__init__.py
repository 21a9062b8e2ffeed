"""Shapes: what records of released datasets look like, by the names that config/ has for them.

To add one: a function that reads a record, its row in :data:`SHAPES`, its name in ``plait.config.shapes``.
What the records lie in, and how pictures are found, is for ``plait.data.shaped`` to know.
"""

from collections.abc import Callable, Mapping
from typing import Any

from plait.data.shapes import classes, interleaved, own, questions, talks, words
from plait.data.shapes.common import Shape, one_of

CONVERSATION = Shape(questions.conversation, one_of("image", "images"))
DOCUMENT = Shape(words.document)
RECORD = Shape(talks.record)
SHAPES: dict[str, Callable[[Mapping[str, Any]], Shape]] = {
    "allava": lambda _: CONVERSATION,
    "c4": lambda _: DOCUMENT,
    "captions": lambda _: Shape(classes.captions, holds="tars"),
    "capybara": lambda _: Shape(talks.capybara),
    "cauldron": lambda _: Shape(questions.cauldron, one_of("images")),
    "chat": lambda _: RECORD,
    "codeact": lambda _: RECORD,
    "dvqa": lambda _: Shape(questions.dvqa, one_of("image")),
    "figureqa": lambda _: Shape(questions.figureqa, questions.figure_name, inside="qa_pairs"),
    "file": lambda chosen: own.shape(chosen["path"]),
    "imagenet": lambda chosen: classes.imagenet(chosen["name"], chosen["classes"]),
    "imagenet-21k": lambda chosen: classes.imagenet(chosen["name"], chosen["classes"]),
    "llava": lambda _: CONVERSATION,
    "llavar": lambda _: CONVERSATION,
    "mmc4": lambda chosen: interleaved.mmc4(chosen["missing"]),
    "ocr-vqa": lambda chosen: questions.ocr_vqa(chosen["splits"]),
    "openorca": lambda chosen: talks.openorca(chosen["ids"]),
    "question-answer": lambda chosen: questions.question_answer(
        chosen["image"], chosen["question"], chosen["answer"]
    ),
    "sharegpt": lambda chosen: talks.sharegpt(chosen["min_turns"]),
    "slimpajama": lambda chosen: words.slimpajama(chosen["leave_out"]),
    "text": lambda _: DOCUMENT,
    "websight": lambda _: Shape(questions.websight, one_of("image")),
}


def shape_of(chosen: Mapping[str, Any]) -> Shape:
    """The shape that the settings of a source name."""
    return SHAPES[chosen["name"]](chosen)
