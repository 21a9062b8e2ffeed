"""What records of released datasets look like: the name of a shape, and what can be chosen of it.

``src/plait/data/shapes`` has what reads each of them. To add one: its name here, its row in ``SHAPES`` there.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, StringConstraints

from plait.config.base import Strict

PICTURED = {"allava", "dvqa", "figureqa", "file", "llava", "llavar", "mmc4", "ocr-vqa", "question-answer"}
"""Shapes whose records may name pictures that lie elsewhere."""
SMALL = ("path", "classes")
"""Keys of shapes that name a small file of the user's."""
OWN = ".py"
"""How a shape ends that is a file of the user's."""


class PlainShape(Strict):
    """A shape with nothing to choose: `shape: NAME` says the same."""

    name: Literal[
        "allava",
        "c4",
        "capybara",
        "cauldron",
        "chat",
        "codeact",
        "dvqa",
        "figureqa",
        "llava",
        "llavar",
        "text",
        "websight",
    ] = Field(description="what the records are")


class Slimpajama(Strict):
    """SlimPajama's documents, by the corpus that each comes from."""

    name: Literal["slimpajama"] = Field(description="what the records are")
    leave_out: tuple[str, ...] = Field(
        ("RedPajamaCommonCrawl", "RedPajamaC4"),
        description="values of meta.redpajama_set_name whose documents are left out; SOLO's by default",
    )


class Sharegpt(Strict):
    """ShareGPT's conversations, cleaned as CodeActAgent's are."""

    name: Literal["sharegpt"] = Field(description="what the records are")
    min_turns: NonNegativeInt = Field(0, description="conversations of fewer turns are left out")


class Openorca(Strict):
    """OpenOrca's questions and responses."""

    name: Literal["openorca"] = Field(description="what the records are")
    ids: str = Field("", description="how ids begin; all others are left out, e.g. `cot.`")


class OcrVqa(Strict):
    """OCR-VQA's covers of books, each with several questions."""

    name: Literal["ocr-vqa"] = Field(description="what the records are")
    splits: tuple[Literal[1, 2, 3], ...] = Field(
        (1,), description="1: train, 2: val, 3: test; records of others are left out"
    )


class QuestionAnswer(Strict):
    """Questions and answers about pictures in columns of any names, as Hugging Face `datasets` keeps them."""

    name: Literal["question-answer"] = Field(description="what the records are")
    image: str = Field("image", description="the column of the picture; a list of them is several")
    question: str = Field("question", description="the column of the question; empty: there is none")
    answer: str = Field("answer", description="the column of the answer; of a list the first is taken")


class Captions(Strict):
    """Webdataset tars of pictures and captions, as img2dataset writes them."""

    name: Literal["captions"] = Field(description="what the records are")
    column: str = Field(
        "", description="the column of parquet files that has the captions; empty: the txt of each sample"
    )
    metadata: str = Field(
        "", description="the parquet files, or a folder of them; empty: those beside the tars"
    )
    by: Literal["key", "url"] = Field(
        "key", description="what finds a sample's row: its key, or the url in its json"
    )


class Imagenet(Strict):
    """Pictures by class: folders named by their class, or tars of CLASS_NUMBER.jpg."""

    name: Literal["imagenet", "imagenet-21k"] = Field(
        description="imagenet: a user's picture, the lower-cased name as the answer; "
        "imagenet-21k: picture and name in one turn of the assistant"
    )
    classes: str = Field(
        description="names of the classes: lines of `n01440764 tench`, or a .jsonl of {id, name}"
    )


class Mmc4(Strict):
    """MMC4's interleaved documents: each picture stands before the text that it matches."""

    name: Literal["mmc4"] = Field(description="what the records are")
    missing: Literal["skip", "reject"] = Field(
        "skip", description="a document that lacks a picture is read without it, or rejected"
    )


class OwnShape(Strict):
    """A Python file of yours: `shape: FILE.py` says the same.

    `read(record, pictures)` gives LLaVA's list of turns, `{"from": "human", "value": "<image> What?"}`, a
    `plait.data.chat.Sample`, or None, which leaves the record out. `pictures(record)`, if there is one, names
    the pictures. A record that they fail at is rejected.
    """

    name: Literal["file"]
    path: Annotated[str, StringConstraints(pattern=r"\.py$")] = Field(
        description="the file; its digest is part of the settings, so that another text makes the data again"
    )


def _named(given: Any) -> Any:
    """A shape by its name alone."""
    if not isinstance(given, str):
        return given
    return {"name": "file", "path": given} if given.endswith(OWN) else {"name": given}


Kinds = (
    PlainShape
    | Slimpajama
    | Sharegpt
    | Openorca
    | OcrVqa
    | QuestionAnswer
    | Captions
    | Imagenet
    | Mmc4
    | OwnShape
)
Shape = Annotated[
    Kinds,
    Field(discriminator="name", description="what the records are: a name, or a Python file of yours"),
    BeforeValidator(_named, json_schema_input_type=Kinds | str),
]


def named(source: Any) -> dict[str, str]:
    """The user's files and folders besides `path` that a source names for its shape, by their keys."""
    shape = getattr(source, "shape", None)
    found = {"pictures": getattr(source, "pictures", "")}
    found |= {f"shape.{key}": getattr(shape, key, "") for key in (*SMALL, "metadata")}
    return {key: path for key, path in found.items() if path}


def told(source: Any) -> list[str]:
    """The user's small files that a source's shape is told by: another content makes the data again."""
    found = named(source)
    return [found[key] for key in (f"shape.{one}" for one in SMALL) if key in found]
