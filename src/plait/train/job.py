"""One training job: from a sharded model or a checkpoint to the next checkpoint."""

import json
import os
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from plait import files, layout
from plait.config.run import Around, Asked, pieces_of_sequence, unfit_for_experts
from plait.config.schedule import Schedule, check_warmup
from plait.config.spread import undivided
from plait.errors import CheckpointError, ConfigError, DataError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.train import intact
from plait.train.hardware import check_engine

ENDS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HELD = {"fp32": {"float32", "bfloat16", "float16"}, "bf16": {"bfloat16"}, "fp16": {"float16"}}
"""The types all of whose values a run's type has."""


@dataclass(frozen=True)
class Mixed:
    """A mixture as its analysis has it.

    Attributes:
        folder: the analysis.
    """

    folder: Path

    @cached_property
    def content(self) -> dict[str, Any]:
        """Its sources with their weights, and what an energon reader needs besides."""
        path = self.folder / "mixture.yaml"
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found

    @property
    def sequence(self) -> int:
        """Tokens of its longest sequences."""
        read = self.content.get("decoder_seq_length")
        return read or max(layout.Indexed.parse(shard).seq for shard, _ in self.shards)

    @property
    def shards(self) -> list[tuple[Path, float]]:
        """Indexed shards and their weights."""
        return [(Path(source["prefix"]), float(source["weight"])) for source in self.content["sources"]]


@dataclass(frozen=True)
class Job:
    """What a job trains, by path; every rank reads the same.

    Attributes:
        start: the sharded model or the checkpoint that it starts from.
        analysis: the mixture's analysis.
        schedule: the run's schedule file.
        target: the checkpoint that it publishes.
        settings: the run's settings.
        around: how it is started and what it tells; nothing of it enters the checkpoint.
        asked: what is asked of it besides, as :class:`plait.config.run.Asked`.
    """

    start: str
    analysis: str
    schedule: str
    target: str
    settings: dict[str, Any]
    around: dict[str, Any] = field(default_factory=lambda: Around().model_dump(mode="json"))
    asked: dict[str, Any] = field(default_factory=lambda: Asked(until=0).model_dump(mode="json"))

    def to_json(self) -> str:
        """The job as one argument for the ranks."""
        return json.dumps(asdict(self))

    @property
    def run(self) -> layout.Run:
        """The run that it is a part of."""
        return layout.Run(run=layout.Iteration.parse(self.target).run)

    @property
    def machines(self) -> int:
        """Over how many machines its launcher spreads it."""
        return int(self.around["nodes"]) if self.around["launch"] == "slurm" else 1

    @cached_property
    def saved(self) -> Schedule:
        """The run's length and the iterations that it saves."""
        found = files.read_json(self.schedule)
        return Schedule(int(found["train_iters"]), int(found["save_interval"]))

    @property
    def train_iters(self) -> int:
        """The length of the whole run."""
        return self.saved.train_iters

    @property
    def steps(self) -> tuple[int, int]:
        """The iterations that the job starts after and ends with."""
        start, target = layout.parse(self.start), layout.Iteration.parse(self.target)
        goes_on = isinstance(start, layout.Iteration) and (
            start.run == target.run or not self.settings["finetune"]
        )
        return start.iteration if goes_on else 0, max(target.iteration, self.asked["until"])

    def takes_optimizer(self, before: Path) -> bool:
        """Whether the optimizer's state is taken from where training goes on; its own always is."""
        return bool(self.settings["load_optim"]) or Path(str(self.run)) in before.parents

    def streams(self, before: Path | None) -> int:
        """Into how many streams energon deals the samples: as many as where training goes on from."""
        found = len(list(before.glob(layout.LOADER_FILES))) if before else 0
        return found or self.settings["data_streams"] or int(self.settings["data_parallel_size"])

    @property
    def grid(self) -> Grid:
        """The grid that the run trains on."""
        return Grid(
            tp=self.settings["tensor_model_parallel_size"],
            pp=self.settings["pipeline_model_parallel_size"],
            first=self.settings["num_layers_in_first_pipeline_stage"],
            last=self.settings["num_layers_in_last_pipeline_stage"],
        )

    @property
    def pieces(self) -> int:
        """What a sequence's length is a multiple of."""
        return pieces_of_sequence(self.settings)

    @cached_property
    def mixture(self) -> "Mixed":
        """What is trained."""
        return Mixed(Path(self.analysis))

    @cached_property
    def evaluated(self) -> "Mixed":
        """What is evaluated: another mixture, or the val splits of the same."""
        name = self.around["eval_mixture"]
        return Mixed(Path(str(layout.Analysis(mixture=name)))) if name else self.mixture

    def check(self) -> None:
        """Compare the inputs with one another before any process starts.

        Raises:
            ConfigError, DataError, CheckpointError: what does not fit, in a sentence.
        """
        check_engine(self.settings)
        self._check_steps()
        start = files.read_manifest(self.start)
        if not any(map(os.path.exists, (self.run.states, self.run.saved))):
            self.check_whole()
        self._check_grid(start)
        self._check_frozen(start)
        self._check_goes_on(start)
        self._check_warmup()
        model = Spec.of(self.start, layout.HF_CONFIG)
        why = undivided(self.settings, model.num_layers, {key: self.settings[key] for key in ENDS})
        if why:
            raise ConfigError(f"{self.start} cannot be trained so: {why}")
        unfit = unfit_for_experts(self.settings, model.num_experts)
        if unfit:
            raise ConfigError(unfit, hint="config/README.md says what each key is for")
        for mixture in (self.mixture, self.evaluated) if self.around["eval_interval"] else (self.mixture,):
            intact.check_mixed(mixture.folder, mixture.content)
            if model.vision is not None:
                _check_energon(mixture.content, self.start, model, start["facts"]["tokenizer"])
            for shard, _ in mixture.shards if model.vision is None else ():
                _check_shard(shard, self.start, model, start["facts"]["tokenizer"])
            intact.check_bytes(mixture.folder, self.around["verify_data"], seed=self.target)
        if self.around["eval_interval"] and self.around["eval_mixture"] and model.vision is None:
            intact.check_leaks(
                self.mixture.shards, self.evaluated.shards, self.evaluated.folder, Path(self.run.leaks)
            )
        files.refuse_foreign(layout.Iteration.parse(self.target))

    def _check_steps(self) -> None:
        """The target is saved, and the start is what the run has before it."""
        target, start = layout.Iteration.parse(self.target), layout.parse(self.start)
        for step in (target.iteration, self.steps[1]):
            self.saved.check(step, run=target.run)
        before = self.saved.previous(target.iteration)
        run, iteration = self.settings["start_run"], self.settings["start_iteration"]
        first = 0 if self.settings["finetune"] else iteration
        wanted: layout.Iteration | str
        if before > first:
            wanted = layout.Iteration(run=target.run, iteration=before)
            fits = start == wanted
        elif run:
            wanted = layout.Iteration(run=run, iteration=iteration)
            fits = start == wanted
        else:
            wanted = f"the sharded model {self.settings['model']}"
            fits = isinstance(start, layout.Sharded) and start.model == self.settings["model"]
        if not fits:
            raise ConfigError(f"{target} is trained from {wanted}, not from {start}")

    def check_whole(self) -> None:
        """Nothing that training reads of the start was removed: weights, and the optimizer of who goes on.

        Raises:
            CheckpointError: it was; the key that asked for it is named.
        """
        for name, why in files.pruned(self.start).items():
            is_optimizer = fnmatch(name, layout.OPTIMIZER_FILES)
            if not is_optimizer or (self.steps[0] and self.takes_optimizer(Path(self.start))):
                raise CheckpointError(
                    f"{self.start} has no {'optimizer' if is_optimizer else 'weights'} any more: {why} "
                    "removed it",
                    hint="start from the newest iteration of the run, which is whole",
                )

    def check_undamaged(self) -> None:
        """A checkpoint that training starts from has the bytes that its manifest lists.

        Raises:
            CheckpointError: the file that has not is named, and what to do.
        """
        start = layout.parse(self.start)
        if not isinstance(start, layout.Iteration):
            return
        try:
            files.check_manifest(self.start)
        except DataError as error:
            raise CheckpointError(
                f"{self.start} is damaged: {error}",
                hint=f"bring its files back, or remove {self.start}: asked again, it is trained anew from "
                "the whole one before it",
            ) from error

    def _check_goes_on(self, manifest: dict[str, Any]) -> None:
        """Who goes on, goes on with the same data: the digest holds tokenizer and template too."""
        if not self.steps[0]:
            return
        trained, now = manifest["inputs"].get(self.analysis), files.digest_of_input(self.analysis)
        if trained != now:
            raise DataError(
                f"{self.start} was trained on {self.analysis} of digest {str(trained)[:12]}, "
                f"it is {now[:12]} now",
                hint="bring back the data it was trained on, or start a run of its own from it by start_run",
            )
        given, found = self.settings["data_streams"], self.streams(Path(self.start))
        if given not in (None, found):
            raise ConfigError(
                f"{self.start} has read {found} streams of samples, and data_streams is {given}",
                hint=f"leave data_streams out, or say {found}; data_parallel_size may change",
            )

    def _check_frozen(self, manifest: dict[str, Any]) -> None:
        """What is frozen comes out bit for bit: the run's type must hold every value of it."""
        dtype = self.settings["params_dtype"]
        before = manifest["settings"].get("params_dtype")
        kept = manifest["facts"].get("dtypes", {})
        for part in self.settings["freeze"]:
            types = [NAMES[before]] if manifest["kind"] == "iteration" else kept.get(part, [])
            lost = [one for one in types if one not in HELD[dtype]]
            if lost:
                raise CheckpointError(
                    f"{part} of {self.start} has weights of {lost[0]}, and the run freezes it with "
                    f"params_dtype {dtype}, which would round them",
                    hint=f"build the model with dtype: {dtype} in raw_hf, or train with another params_dtype",
                )

    def _check_warmup(self) -> None:
        """The length of a run by epochs is known only now."""
        try:
            check_warmup(self.settings, self.train_iters, self.mixture.sequence)
        except ValueError as error:
            raise ConfigError(
                f"{self.run.schedule} and config/: {error}", hint="shorten the warmup, or train longer"
            ) from error

    def _check_grid(self, manifest: dict[str, Any]) -> None:
        """A sharded model is cut for one grid; another run's checkpoint is read on any."""
        kind, found = manifest["kind"], manifest["facts"]["grid"]
        if kind not in {"sharded", "iteration"}:
            raise CheckpointError(f"{self.start} is of kind {kind!r}; training starts from a sharded model")
        another_run = kind == "iteration" and layout.parse(self.start).run != layout.parse(self.target).run
        if Grid(**found) != self.grid and not another_run:
            raise CheckpointError(
                f"{self.start} is cut for {Grid(**found)}, the run wants {self.grid}",
                hint="shard the model for that grid, or change the run's parallel sizes in config/",
            )


def _check_energon(mixture: dict[str, Any], start: str, model: Spec, tokenizer: str) -> None:
    """Refuse data that the model was not made for."""
    where = f"the mixture's tokenizer {mixture['tokenizer']}"
    found = files.digest(Path(mixture["tokenizer"]) / layout.FAST)
    if found != tokenizer:
        raise DataError(
            f"{where} is {found[:12]}, {start} has {tokenizer[:12]}",
            hint="a mixture's format and a run's model must name the same tokenizer",
        )
    assert model.vision is not None
    picture = mixture["image_token_id"]
    if picture != model.image_token_id:
        raise DataError(
            f"the mixture was counted with token {picture} for a picture, {start} reads token "
            f"{model.image_token_id} as one",
            hint="make the mixture's tokenizer of the model: tokenizers.*, kind model",
        )
    if max(picture, model.pad_token_id or 0) >= model.vocab_size:
        raise CheckpointError(
            f"{start} has {model.vocab_size} rows of tokens, a picture is its token {picture} and padding "
            f"{model.pad_token_id}",
            hint="mend image_token_index and pad_token_id of its config.json",
        )
    tokens, seq = mixture["format"]["picture_tokens"], mixture["decoder_seq_length"]
    if tokens != model.vision.tokens:
        raise DataError(
            f"the mixture counts {tokens} tokens a picture, the tower of {start} gives {model.vision.tokens}",
            hint="set picture_tokens of the format in config/ to that number",
        )
    _check_length(f"the mixture's decoder_seq_length {seq}", seq, start, model)


def _check_shard(shard: Path, start: str, model: Spec, tokenizer: str) -> None:
    """Refuse data that the model was not made for."""
    facts = files.read_manifest(shard, kind="indexed")["facts"]
    if facts["tokenizer"] != tokenizer:
        raise DataError(
            f"{shard} was made by tokenizer {facts['tokenizer'][:12]} of {facts['vocab_size']} tokens, "
            f"{start} has {tokenizer[:12]} of {model.vocab_size}",
            hint="a mixture's format and a run's model must name the same tokenizer",
        )
    seq = layout.Indexed.parse(shard).seq
    _check_length(f"{shard} has sequences of {seq} tokens", seq, start, model)


def _check_length(what: str, seq: int, start: str, model: Spec) -> None:
    longest = model.max_position_embeddings
    if seq > longest:
        raise DataError(
            f"{what}, {start} has max_position_embeddings {longest}",
            hint=f"shorten the mixture's sequences to at most {longest} tokens",
        )
