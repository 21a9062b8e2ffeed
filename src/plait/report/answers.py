"""What a model folder answers to a prompt, by transformers, greedily and without a network."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.data import images
from plait.errors import ConfigError, DataError, RecordError
from plait.models.specs import SOLO, Spec
from plait.tokens.llava import upright
from plait.verify.logits import carries_our_code


@dataclass(frozen=True)
class Token:
    """A token of an answer and how likely it was, among those that may be written."""

    id: int
    token: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """A prompt and what was answered."""

    prompt: str
    image: str | None
    answer: str
    tokens: tuple[Token, ...]


class Model:
    """A folder of any recipe, ready to be asked."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            DataError, CheckpointError: it is no model that plait knows.
            ProofError: it carries code that plait did not write.
        """
        self.spec = Spec.of(folder)
        self.folder = folder
        os.environ["HF_HUB_OFFLINE"] = "1"
        with tempfile.TemporaryDirectory() as modules:
            os.environ.setdefault("HF_MODULES_CACHE", modules)
            import transformers

            ours = {"trust_remote_code": carries_our_code(folder)}
            sees = self.spec.vision is not None
            kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
            self.model = kind.from_pretrained(folder, dtype="auto", **ours).eval()
            has_processor = sees or self.spec.architecture == SOLO
            reader = transformers.AutoProcessor if has_processor else transformers.AutoTokenizer
            self.reader: Any = reader.from_pretrained(folder, **ours)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, by itself or within the processor."""
        return getattr(self.reader, "tokenizer", self.reader)

    def ask(self, prompt: str, image: str | None = None, *, max_new_tokens: int = 32) -> Answer:
        """Answer one prompt: at each step the likeliest token that may be written.

        Raises:
            ConfigError: there is nothing to ask, or a picture for a model that sees none.
            DataError: the picture is not there, or is none.
        """
        import torch

        inputs = self._inputs(prompt, None if image is None else self._opened(image))
        with torch.no_grad():
            found = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_scores=True,
            )
        ids = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        chances = [
            scores[0].float().softmax(-1)[one].item() for one, scores in zip(ids, found.scores, strict=True)
        ]
        names = self.tokenizer.convert_ids_to_tokens(ids)
        tokens = tuple(map(Token, ids, names, chances))
        return Answer(prompt, image, self.tokenizer.decode(ids, skip_special_tokens=True).strip(), tokens)

    def _inputs(self, prompt: str, picture: Any) -> Mapping[str, Any]:
        """The prompt as the model was trained on such: by its chat template, or as it is."""
        if not prompt and picture is None:
            raise ConfigError("there is nothing to ask", hint="give --prompt, or --image, or both")
        if self.spec.architecture == SOLO:
            text = prompt if picture is None else prompt or ""
            seen = {} if picture is None else {"images": picture}
            return dict(self.reader(text=text, return_tensors="pt", **seen))
        if self.spec.vision is None and picture is not None:
            raise ConfigError(
                f"{self.folder} is a model of text and sees no picture", hint="leave --image out"
            )
        shown = [] if picture is None else [{"type": "image"}]
        words = f"\n{prompt}" if shown else prompt
        turn = {"role": "user", "content": [*shown, {"type": "text", "text": words}] if shown else words}
        text = self._templated([turn], words)
        seen = {} if picture is None else {"images": picture}
        return dict(self.reader(text=text, add_special_tokens=False, return_tensors="pt", **seen))

    def _opened(self, image: str) -> Any:
        """A picture as training sees it: LLaVA's are turned as their camera was held, SOLO's are not."""
        path = Path(image).expanduser()
        read = images.open_picture if self.spec.vision is None else upright
        try:
            return read(path.read_bytes())
        except OSError as error:
            raise DataError(f"the picture {image} cannot be read: {error.strerror}") from error
        except RecordError as error:
            raise DataError(f"{image}: {error}", hint="give a png, jpeg or webp file") from error

    def _templated(self, turns: list[dict[str, Any]], words: str) -> str:
        if self.tokenizer.chat_template is None and getattr(self.reader, "chat_template", None) is None:
            return f"{self.tokenizer.bos_token or ''}{words}"
        text: str = self.reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text


def ask_all(folder: Path, prompts: Iterable[Mapping[str, Any]]) -> list[Answer]:
    """Ask every prompt of a run's ``generate``."""
    model = Model(folder)
    return [model.ask(one["prompt"], one["image"], max_new_tokens=one["max_new_tokens"]) for one in prompts]


def table(answer: Answer) -> str:
    """The tokens of an answer, a line each, with ids and probabilities."""
    return "\n".join(f"{one.probability:7.2%}  {one.id:>7}  {one.token}" for one in answer.tokens)
