"""Conversations about pictures, as LLaVA reads them: one sample a sequence, a picture T equal tokens.

n = tokens of a sample, T = tokens of a picture, k = its pictures, side = side of a picture in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from plait.data import chat, images
from plait.errors import DataError, RecordError
from plait.files import read_manifest
from plait.layout import FAST
from plait.tokens import instructions
from plait.tokens.encode import starts
from plait.tokens.pictures import special
from plait.tokens.roles import ASSISTANT
from plait.tokens.templates import TEMPLATES, Marks
from plait.tokens.vocabulary import IMAGE

LANGUAGES = {"llava": "en", "jp_alpaca": "ja"}
"""The language of a template's instructions, where the format names none."""


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens.

    Attributes:
        input_ids: (n,), a picture's token T times for every picture.
        trained: (n,), true where a token is of an answer, or its EOS.
        pictures: the encoded pictures, in order.
        picture_rows: (n,), 0 .. k * T - 1 where a feature stands, -1 elsewhere.
        clipped: tokens that were cut off its end.
        place: the tar and the key in it, as energon gave them.
    """

    input_ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    pictures: Sequence[bytes]
    picture_rows: NDArray[np.int64]
    clipped: int = 0
    place: str = ""

    def clip(self, length: int) -> "Encoded":
        """At most ``length`` tokens of it; pictures that lose tokens lose those features only."""
        if len(self.input_ids) <= length:
            return self
        return Encoded(
            self.input_ids[:length],
            self.trained[:length],
            self.pictures,
            self.picture_rows[:length],
            len(self.input_ids) - length,
            self.place,
        )

    def teaches(self, length: int) -> bool:
        """Whether a trained token is among the first ``length``: the very first is nothing's next."""
        return bool(self.trained[1:length].any())


class LlavaRenderer:
    """Turns conversations into tokens as one format of the config says."""

    def __init__(self, folder: Path, form: Mapping[str, Any], image_token_id: int | None = None) -> None:
        """Read a tokenizer.

        Args:
            folder: the tokenizer.
            form: ``template``, ``instruction``, ``language`` and ``picture_tokens`` of a format.
            image_token_id: the model's token for a picture; None: the tokenizer's own.

        Raises:
            ConfigError: the tokenizer has no token for a picture.
            DataError: it has none for the end of an answer, the template has no place for a picture, or the
                format does not say how many tokens one is.
        """
        facts = read_manifest(folder, kind="tokenizer")["facts"]
        _check(folder, facts, form)
        self.form = form
        self.tokens: int = form["picture_tokens"]
        self.template = TEMPLATES[form["template"]]
        self.image_id, self._picture = special(folder, facts, "image_token_id", image_token_id)
        self._tokenizer = Tokenizer.from_file(str(folder / FAST))
        self._marks = Marks(bos=self._name(facts["bos_id"]), eos=self._name(facts["eos_id"]))

    def _name(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    def instructed(self, sample: chat.Sample, key: str) -> chat.Sample:
        """The conversation as the format's ``instruction`` wants it."""
        if self.form["instruction"] == "none":
            return instructions.reduced(sample)
        if self.form["instruction"] == "drawn":
            language = self.form["language"] or LANGUAGES[self.form["template"]]
            return instructions.instructed(sample, key, language)
        return sample

    def encode(self, sample: chat.Sample) -> Encoded:
        """Tokenise one conversation.

        Raises:
            RecordError: the template cannot write it, it has nothing to learn from, or a text of it
                writes the token that stands for a picture.
        """
        pieces = list(self.template.pieces(sample, self._marks))
        written = sum(isinstance(piece.content, chat.Picture) for piece in pieces)
        if written != len(sample.pictures):
            raise RecordError("a picture stands outside users' turns", reason="picture_not_users")
        texts = [p.content if isinstance(p.content, str) else self._picture for p in pieces]
        encoding = self._tokenizer.encode("".join(texts), add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        roles = np.repeat([piece.role for piece in pieces], np.diff(starts(encoding, texts)))
        is_picture = ids == self.image_id
        if is_picture.sum() != written:
            raise RecordError(
                f"a text writes {self._picture}, which stands for a picture", reason="picture_in_text"
            )
        if not (roles == ASSISTANT).any():
            raise RecordError("there is no answer to learn from", reason="no_answer")
        times = np.where(is_picture, self.tokens, 1)
        stands = np.repeat(is_picture, times)
        rows = np.full(len(stands), -1, np.int64)
        rows[stands] = np.arange(stands.sum())
        trained = np.repeat((roles == ASSISTANT) & ~is_picture, times)
        return Encoded(np.repeat(ids, times), trained, sample.pictures, rows)


def _check(folder: Path, facts: Mapping[str, Any], form: Mapping[str, Any]) -> None:
    """Refuse a format that cannot write pictures, or answers with an end."""
    template = TEMPLATES.get(form["template"])
    if template is None or template.pictures != IMAGE:
        raise DataError(
            f"the template {form['template']} has no {IMAGE}", hint="use the template llava or jp_alpaca"
        )
    if facts["eos_id"] is None:
        raise DataError(f"{folder} has no EOS, so no answer would have an end", hint="name its eos_token")
    if not form["picture_tokens"]:
        raise DataError(
            "the format has no picture_tokens", hint="set it to the features of the model's tower"
        )


def pixels(pictures: Sequence[bytes], processor: Any) -> NDArray[np.float32]:
    """Pictures (k, 3, side, side), resized and normalised by transformers' own image processor.

    Raises:
        RecordError: one is no picture.
    """
    found = processor(images=[images.upright(each) for each in pictures], return_tensors="np")["pixel_values"]
    return np.asarray(found, np.float32)
