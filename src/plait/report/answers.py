"""What a model folder answers to a prompt, by transformers, greedily and without a network."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from plait import files
from plait.config.paths import local
from plait.data import images
from plait.errors import CheckpointError, ConfigError, DataError, RecordError
from plait.layout import FAST, MANIFEST
from plait.models.specs import SOLO, Spec
from plait.models.tower import PREPROCESSOR, PROCESSOR, preprocessor_of
from plait.models.weights import BUFFERS, FolderTensors, check_shapes
from plait.tokens.tokenizer import CONFIG, SENTENCEPIECE, UNREADABLE, check_fast
from plait.tokens.vocabulary import GROUPS, IMAGE, PICTURE
from plait.verify.reference import carries_our_code

CONFIGS = ("config.json", "generation_config.json", CONFIG, PROCESSOR, PREPROCESSOR)
"""What transformers reads of a folder beside weights, tokenizer and template."""
UNMARKED = "pretrain"
"""The template without markup: no chat template writes it."""


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
        """Load it, with every name and shape that its config promises.

        Raises:
            DataError: a file that it needs is missing or cannot be read.
            CheckpointError: it is no model that plait knows, or its weights are not whole.
            ProofError: it carries code that plait did not write.
        """
        self.spec = Spec.of(folder)
        self.folder = folder
        has_processor = self.spec.vision is not None or self.spec.architecture == SOLO
        _check_files(folder, has_processor=has_processor)
        if self.spec.vision is not None:
            preprocessor_of(folder, self.spec.vision)
        check_shapes(FolderTensors(folder).shapes, self.spec.shapes, str(folder))
        self.template = _trained_with(folder)
        os.environ["HF_HUB_OFFLINE"] = "1"
        with tempfile.TemporaryDirectory() as modules:
            os.environ.setdefault("HF_MODULES_CACHE", modules)
            import transformers

            ours = {"trust_remote_code": carries_our_code(folder)}
            sees = self.spec.vision is not None
            kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
            reader = transformers.AutoProcessor if has_processor else transformers.AutoTokenizer
            try:
                self.reader: Any = reader.from_pretrained(folder, **ours)
                model, loading = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **ours)
            except UNREADABLE as error:
                words = str(error).partition("\n")[0]
                raise DataError(
                    f"{folder}: transformers cannot load it: {type(error).__name__}: {words}",
                    hint="download or export the folder again",
                ) from error
        _refuse_incomplete(loading, folder)
        self.model = model.eval()

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
        self._check_asked(prompt, picture)
        seen = {} if picture is None else {"images": picture}
        if not self._has_template:
            return self._unmarked(prompt, seen)
        # LLaVA's data put a picture on a line of its own, SOLO's before the text.
        words = f"\n{prompt}" if seen and self.spec.vision is not None else prompt
        parts = [{"type": "image"}, {"type": "text", "text": words}]
        text = self._templated([{"role": "user", "content": parts if seen else words}])
        if seen and text.count(self._mark) != 1:
            raise ConfigError(
                f"the chat template of {self.folder} writes no picture", hint="leave --image out"
            )
        plain = {} if self.spec.architecture == SOLO else {"add_special_tokens": False}
        return dict(self.reader(text=text, return_tensors="pt", **plain, **seen))

    def _check_asked(self, prompt: str, picture: Any) -> None:
        """Refuse what the model cannot be asked."""
        if not prompt and picture is None:
            raise ConfigError("there is nothing to ask", hint="give --prompt, or --image, or both")
        solo = self.spec.architecture == SOLO
        if self.spec.vision is None and not solo and picture is not None:
            raise ConfigError(
                f"{self.folder} is a model of text and sees no picture", hint="leave --image out"
            )
        marks = (IMAGE, *GROUPS["vision"]) if solo else (self._mark,) if self.spec.vision else ()
        for mark in marks:
            if mark in prompt:
                raise ConfigError(
                    f"the prompt writes {mark}, which stands for a picture or a part of one",
                    hint="leave it out: --image FILE puts a picture before the prompt",
                )

    @property
    def _mark(self) -> str:
        """What stands for a picture in a text."""
        return PICTURE if self.spec.architecture == SOLO else str(self.reader.image_token)

    @property
    def _has_template(self) -> bool:
        if self.template == UNMARKED:
            return False
        return bool(self.tokenizer.chat_template or getattr(self.reader, "chat_template", None))

    def _unmarked(self, prompt: str, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Text alone, as in pretraining; LLaVA's picture before it."""
        if self.spec.architecture == SOLO:
            return dict(self.reader(text=prompt, return_tensors="pt", **seen))
        mark = f"{self._mark}\n" if seen else ""
        text = f"{self.tokenizer.bos_token or ''}{mark}{prompt}"
        return dict(self.reader(text=text, add_special_tokens=False, return_tensors="pt", **seen))

    def _opened(self, image: str) -> Any:
        """A picture as training sees it: LLaVA's are turned as their camera was held, SOLO's are not."""
        path = local(image)
        read = images.open_picture if self.spec.vision is None else images.upright
        try:
            return read(path.read_bytes())
        except OSError as error:
            raise DataError(f"the picture {image} cannot be read: {error.strerror}") from error
        except RecordError as error:
            raise DataError(f"{image}: {error}", hint="give a png, jpeg or webp file") from error

    def _templated(self, turns: list[dict[str, Any]]) -> str:
        try:
            text: str = self.reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(
                f"the chat template of {self.folder} cannot write a prompt: {error}",
                hint="mend its chat_template.jinja, or export the model again",
            ) from error
        return text


def _check_files(folder: Path, *, has_processor: bool) -> None:
    """Find what is missing or is no JSON object before transformers does.

    Raises:
        DataError: the file is named.
    """
    for name in CONFIGS:
        if (folder / name).is_file():
            files.read_object(folder / name)
    if (folder / FAST).is_file():
        check_fast(folder / FAST)
    elif not (folder / SENTENCEPIECE).is_file():
        raise DataError(
            f"{folder} has neither {FAST} nor {SENTENCEPIECE}",
            hint="copy the model's tokenizer files into it",
        )
    if has_processor and not (folder / PROCESSOR).is_file():
        raise DataError(
            f"{folder} has no {PROCESSOR}, which says how pictures and text are joined",
            hint="copy it from where the model comes from, or export the model again",
        )


def _trained_with(folder: Path) -> str | None:
    """The template of the run that the folder is the export of; None where nothing says it."""
    if not (folder / MANIFEST).is_file():
        return None
    template = files.read_manifest(folder)["settings"].get("template")
    return None if template is None else str(template)


def _refuse_incomplete(loading: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model that transformers has drawn a part of, or not used all of."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(
            str(name)
            for name in loading[kind]
            if not any(known.fullmatch(str(name)) for known in BUFFERS.values())
        )
        if names:
            raise CheckpointError(
                f"{folder}: transformers has {kind.replace('_', ' ')}: {', '.join(names[:3])}",
                hint="its answers would not be the model's: download or export the folder again",
            )


def ask_all(folder: Path, prompts: Iterable[Mapping[str, Any]]) -> list[Answer]:
    """Ask every prompt of a run's ``generate``."""
    model = Model(folder)
    return [model.ask(one["prompt"], one["image"], max_new_tokens=one["max_new_tokens"]) for one in prompts]


def table(answer: Answer) -> str:
    """The tokens of an answer, a line each, with ids and probabilities."""
    return "\n".join(f"{one.probability:7.2%}  {one.id:>7}  {one.token}" for one in answer.tokens)
