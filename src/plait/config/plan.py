"""What follows from a config: which artifact is made from which, and with what settings.

``settings`` is the slice of the config that decides an artifact's content, plus the version of the
stage's code. Rules carry it as a parameter and manifests record it: a changed slice or a raised
version remakes the artifact, an edited comment does not. Raise a stage's version with every change
of its code that changes what it writes.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from plait import layout
from plait.config.fit import picture_token
from plait.config.gguf import GgufModel
from plait.config.hub import HubData, HubModel, UrlData
from plait.config.images import Kind, environment
from plait.config.lock import Fetchable, Listed, Lock
from plait.config.model import (
    ChatJsonl,
    Config,
    EnergonFolder,
    ExtendedTokenizer,
    Files,
    FolderModel,
    FolderTokenizer,
    InitSizes,
    LlavaJson,
    LlavaModel,
    Model,
    ModelTokenizer,
    Tars,
    TowerModel,
    YouSupply,
)
from plait.config.paths import NAMES, check_there, local
from plait.config.remembered import remembered
from plait.config.run import Around, Run, unfit_for_experts
from plait.config.schedule import Schedule
from plait.config.shapes import named, told
from plait.config.spread import undivided
from plait.errors import ConfigError
from plait.files import adopted, canonical, digest, digest_now, pruned, read_json, sizes

VERSIONS = {
    "raw": 3,
    "chat": 11,
    "lock": 1,
    "fetch": 1,
    "tokenizer": 3,
    "index": 7,
    "energon": 9,
    "analyse": 11,
    "build": 4,
    "convert": 5,
    "shard": 5,
    "verify": 6,
    "schedule": 1,
    "train": 7,
    "export": 5,
    "report": 1,
    "generate": 3,
}
PATHS = (ChatJsonl, LlavaJson, Tars, EnergonFolder, Files)
"""Sources that name a path of the user's."""
MODELS = {layout.HfModel, layout.Megatron, layout.Sharded, layout.Tokenizer}
"""What a run starts from, and what that is made from."""
SPLIT = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}


class Plan:
    """The config, asked by artifact."""

    def __init__(self, config: Config) -> None:
        """Take a checked config."""
        self.config = config
        self.lock = Lock()
        self._texts: dict[Any, str] = {}

    # What is made from what

    def dataset(self, name: str) -> Any:
        """The dataset of this name, or an error that lists the known ones."""
        return _known("dataset", name, self.config.datasets)

    def run(self, name: str) -> Run:
        """The run of this name, or an error that lists the known ones."""
        if name not in self.config.runs and remembered(name):
            raise ConfigError(f"run {name} is no longer in config/", hint=remembered(name))
        run: Run = _known("run", name, self.config.runs)
        return run

    def chats(self, indexed: layout.Indexed) -> list[layout.Chat]:
        """The shards of chat records that make one indexed shard."""
        dataset = self.dataset(indexed.dataset)
        _check_shard(indexed.dataset, indexed.shard, dataset.shards)
        names = dataset.pack_together or (indexed.dataset,)
        return [layout.Chat(dataset=name, shard=indexed.shard) for name in names]

    def raw(self, chat: layout.Chat) -> layout.Raw:
        """The raw source of a shard of chat records."""
        dataset = self.dataset(chat.dataset)
        if dataset.source is None:
            raise ConfigError(f"dataset {chat.dataset} packs others together and has no records itself")
        _check_shard(chat.dataset, chat.shard, dataset.shards)
        return layout.Raw(dataset=chat.dataset)

    def fetchables(self) -> dict[str, Fetchable]:
        """Every entry of config/ that comes from afar, by its place there; none adopted."""
        found: dict[str, Any] = {f"datasets.{name}": one.source for name, one in self.config.datasets.items()}
        for name, source in self.config.raw_hf.items():
            if adopted(layout.HfModel(model=name)) is None:
                found[f"raw_hf.{name}"] = source
        return {
            where: one
            for where, one in found.items()
            if isinstance(one, HubModel | HubData | UrlData) or (isinstance(one, GgufModel) and one.place)
        }

    def fetched(self, where: str) -> list[layout.HubFile | layout.HubTree]:
        """The files that an entry of config/ comes as; its tree alone, where that is not locked yet."""
        source = self.fetchables().get(where)
        if source is None:
            return []
        found = self.lock.files(source, where)
        if found is None and isinstance(source, HubModel | HubData):
            return [source.tree]
        return [*(found or ())]

    def to_fetch(self, where: str) -> str:
        """A line that says what an entry of config/ comes as, and what of it is here."""
        source, found = self.fetchables()[where], self.fetched(where)
        if isinstance(source, UrlData):
            name, listed = source.url, [self.lock.url(source)]
        elif isinstance(source, GgufModel):
            name, listed = f"{source.file} of {source.package}", [Listed(sha256=source.sha256)]
        else:
            tree = self.lock.tree(source.tree)
            name = f"{source.tree.key} at {tree.commit[:12] if tree else '?'}"
            listed = [tree.files[one.file] for one in found if tree and isinstance(one, layout.HubFile)]
        size = sum(one.bytes or 0 for one in listed)
        here = sum(Path(file.manifest).is_file() for file in found)
        return f"{where}: {name}: {len(found)} files, {size / 1e9:.3f} GB; {here} of them are here."

    def fetching(self, file: layout.HubFile) -> dict[str, Any]:
        """What is known of a file before it is fetched.

        Raises:
            ConfigError: nothing in config/ or its lock names the file.
        """
        for source in self.fetchables().values():
            if isinstance(source, UrlData) and layout.HubFile.of_url(source.url) == file:
                return {"url": source.url, "sha256": source.sha256}
            if isinstance(source, GgufModel) and source.place == file:
                return source.model_dump(include={"package", "file", "sha256"})
        listed = self.lock.listed(file)
        if listed is None:
            raise ConfigError(
                f"nothing in config/ or {self.lock.path} comes as {file}",
                hint="`plait lock` resolves what config/ takes from the hub",
            )
        return _dump(listed)  # type: ignore[no-any-return]

    def commit(self, source: Any) -> dict[str, str]:
        """The commit of an entry of config/ that the hub has; nothing for any other."""
        return {"commit": self.lock.commit(source)} if isinstance(source, HubModel | HubData) else {}

    def sources(self, raw: layout.Raw) -> list[layout.Artifact]:
        """The files that a raw source comes as, from afar; what it is made from here must be there.

        Raises:
            ConfigError: its path does not exist, or it has none because it packs others together.
        """
        source = self.dataset(raw.dataset).source
        if source is None:
            raise ConfigError(f"dataset {raw.dataset} packs others together and has no raw source itself")
        if isinstance(source, PATHS):
            check_there(f"datasets.{raw.dataset}.source.path", source.path)
        for key, path in named(source).items():
            check_there(f"datasets.{raw.dataset}.source.{key}", path)
        return [*self.fetched(f"datasets.{raw.dataset}")]

    def told(self, dataset: str) -> dict[str, Any]:
        """Digests of the user's small files that say how a dataset's records are read."""
        there = [path for path in told(self.dataset(dataset).source) if local(path).is_file()]
        return {"told": {path: digest(local(path)) for path in there}} if there else {}

    def sizes(self, raw: layout.Raw) -> dict[str, int]:
        """How many bytes each of the user's own files of a raw source has."""
        source = self.dataset(raw.dataset).source
        return sizes(source.path, NAMES[source.kind]) if isinstance(source, PATHS) else {}

    def to_supply(self, raw: layout.Raw) -> str:
        """What the user must supply before a raw source can be made; empty where it is nothing."""
        source = self.dataset(raw.dataset).source
        if not isinstance(source, YouSupply):
            return ""
        return f"{raw}: {source.what}; name it in datasets.{raw.dataset}.source, kind {source.as_kind}"

    def shards(self, energon: layout.Energon) -> dict[str, list[layout.Artifact]]:
        """What an energon dataset is made from: its shards of chat records, or a prepared folder."""
        dataset = self.dataset(energon.dataset)
        if isinstance(dataset.source, EnergonFolder):
            return {"sources": [layout.Raw(dataset=energon.dataset)]}
        names = dataset.pack_together or (energon.dataset,)
        return {
            "sources": [layout.Chat(dataset=name, shard=n) for name in names for n in range(dataset.shards)]
        }

    def uncut(self, sharded: layout.Sharded) -> layout.Megatron:
        """The whole model that is cut for a grid, if the grid can hold it."""
        self.check_grid(sharded)
        return layout.Megatron(model=sharded.model)

    def tokenizer_of(self, indexed: layout.Indexed) -> layout.Tokenizer:
        """The tokenizer that makes the tokens of an indexed shard."""
        form = _known("format", indexed.format, self.config.formats)
        return layout.Tokenizer(tokenizer=form.tokenizer)

    def base_tokenizer(self, tokenizer: layout.Tokenizer) -> list[layout.Tokenizer | layout.HfModel]:
        """The tokenizer that this one extends, or the model that it is of, if any.

        Raises:
            ConfigError: it is read from a folder that does not exist.
        """
        source = _known("tokenizer", tokenizer.tokenizer, self.config.tokenizers)
        if isinstance(source, FolderTokenizer):
            check_there(f"tokenizers.{tokenizer.tokenizer}.path", source.path)
        if isinstance(source, ExtendedTokenizer):
            return [layout.Tokenizer(tokenizer=source.base)]
        if isinstance(source, ModelTokenizer):
            return [layout.HfModel(model=source.model)]
        return []

    def mixed(self, analysis: layout.Analysis) -> dict[str, list[layout.Artifact]]:
        """What a mixture is analysed from: packed shards, or a tokenizer and energon datasets."""
        mixture = _known("mixture", analysis.mixture, self.config.mixtures)
        if mixture.pack:
            return {"tokenizer": [], "indexed": [*self.indexed(analysis)]}
        tokenizer = self.config.formats[mixture.format].tokenizer
        names = dict.fromkeys(mixture.names + mixture.validation)
        return {
            "tokenizer": [layout.Tokenizer(tokenizer=tokenizer)],
            "indexed": [layout.Energon(dataset=name) for name in names],
        }

    def indexed(self, analysis: layout.Analysis) -> list[layout.Indexed]:
        """Every indexed shard of a mixture."""
        mixture = _known("mixture", analysis.mixture, self.config.mixtures)
        return [
            layout.Indexed(format=mixture.format, dataset=name, seq=mixture.pack, shard=shard)
            for name in mixture.names
            for shard in range(self.dataset(name).shards)
        ]

    def quoted(
        self, analysis: layout.Analysis, cut: Callable[[Iterable[Any]], list[Any]] = list
    ) -> dict[str, list[str]]:
        """The files that a mixture's page quotes besides its sources: tokenizers, rejects and their ledgers.

        Of what was adopted there are none: what it was made from need not be here.

        Args:
            analysis: the mixture's.
            cut: puts batches in the place of shards; a batch stands for all files of its shards.
        """
        sources = [one for one in self.mixed(analysis)["indexed"] if not self.adopted(one)]
        made_from = dict.fromkeys(
            one for source in sources for several in self.inputs(source).values() for one in several
        )
        words = [one for one in made_from if isinstance(one, layout.Tokenizer)]
        chats = cut(one for one in made_from if isinstance(one, layout.Chat) and not self.adopted(one))
        return {
            "words": [str(one) for one in words],
            "rejects": [one.rejects for one in chats if isinstance(one, layout.Chat)],
            "ledgers": [one.manifest for one in (*words, *chats)],
        }

    def parts(self, hf: layout.HfModel) -> list[layout.HfModel | layout.Tokenizer]:
        """The base model and the tokenizer that a Hugging Face model is made from.

        Raises:
            ConfigError: it is a folder or a file that does not exist.
        """
        source = _known("raw_hf", hf.model, self.config.raw_hf)
        if isinstance(source, FolderModel) or (isinstance(source, GgufModel) and source.path):
            check_there(f"raw_hf.{hf.model}.path", source.path)
        if isinstance(source, FolderModel | HubModel | TowerModel | GgufModel):
            return []
        tokenizer = layout.Tokenizer(tokenizer=source.tokenizer)
        if isinstance(source, InitSizes):
            return [tokenizer]
        base = layout.HfModel(model=source.base)
        if isinstance(source, LlavaModel):
            return [base, layout.HfModel(model=source.vision), tokenizer]
        return [base, tokenizer]

    def hf(self, model: str) -> layout.HfModel:
        """The Hugging Face folder that a Megatron model is converted from."""
        if model in self.config.models:
            return layout.HfModel(model=self.config.models[model].source)
        _known("model", model, self.config.raw_hf | self.config.models)
        return layout.HfModel(model=model)

    def proof(self, model: str) -> dict[str, str]:
        """How a model is proven, where it is not by logits."""
        known = self.config.models.get(model)
        return {"proof": known.proof} if known and known.proof != "logits" else {}

    def taken(self, dataset: str) -> dict[str, Any]:
        """The samples that a dataset takes, where it does not take all."""
        found: dict[str, Any] = self.dataset(dataset).model_dump(
            mode="json", include={"by_hash", "duplicates"}, exclude_defaults=True
        )
        return found

    def sharded(self, name: str) -> layout.Sharded:
        """The sharded model that a run starts from."""
        run = self.run(name)
        return layout.Sharded(
            model=run.model,
            tp=run.tensor_model_parallel_size,
            pp=run.pipeline_model_parallel_size,
        )

    def exports(self) -> list[layout.Export]:
        """What the default target asks for."""
        return [
            layout.Export(run=name, step=step)
            for name, run in self.config.runs.items()
            for step in run.exports
        ]

    def answers(self) -> list[layout.Generated]:
        """What the exports of the default target are asked."""
        return [
            layout.Generated(run=export.run, step=export.step)
            for export in self.exports()
            if self.run(export.run).generate
        ]

    def curves(self) -> list[layout.LossCurve]:
        """The loss curves of the runs that the default target asks for."""
        return [layout.LossCurve(run=name) for name, run in self.config.runs.items() if run.exports]

    def drawn(self, curve: layout.LossCurve) -> list[layout.Iteration]:
        """The checkpoints that must be there before a run's loss curve is drawn.

        Raises:
            ConfigError: the run has no exports, so nothing says how far the curve goes.
        """
        exports = self.run(curve.run).exports
        if not exports:
            raise ConfigError(
                f"run {curve.run} has no exports in config/, so nothing says how far its loss curve goes",
                hint=f"name iterations in runs.{curve.run}.exports",
            )
        return [layout.Iteration(run=curve.run, iteration=step) for step in exports]

    def asked(self, generated: layout.Generated) -> layout.Export:
        """The export that answers a run's prompts.

        Raises:
            ConfigError: the run asks nothing, or about a picture that is not there.
        """
        if not self.run(generated.run).generate:
            raise ConfigError(
                f"run {generated.run} asks its exports nothing",
                hint=f"name prompts in runs.{generated.run}.generate",
            )
        for number, one in enumerate(self.run(generated.run).generate):
            if one.image:
                check_there(f"runs.{generated.run}.generate[{number}].image", one.image)
        return layout.Export(run=generated.run, step=generated.step)

    def inputs(self, artifact: Any) -> dict[str, list[layout.Artifact]]:
        """The artifacts that one is made from, by the name its rule has for them.

        What an iteration starts from depends on its schedule: see :meth:`start`.

        Raises:
            ConfigError: the artifact cannot exist; it says what is legal.
        """
        found: dict[str, list[layout.Artifact]] = INPUTS[type(artifact)](self, artifact)
        return found

    def analysis(self, run: str) -> layout.Analysis:
        """The analysis of the mixture that a run trains on."""
        return layout.Analysis(mixture=self.run(run).mixture)

    def template(self, run: str) -> str:
        """The template of the conversations that a run trains on."""
        return self.config.formats[self.config.mixtures[self.run(run).mixture].format].template

    def start(self, iteration: layout.Iteration, schedule: Schedule | None) -> layout.Artifact:
        """What an iteration is trained from: the saved one before it, another run's, or the sharded model.

        Args:
            iteration: the one to be trained.
            schedule: the run's schedule, where it is known. Without it ``save_interval`` of config/
                is enough; where that waits for the data too, the sharded model stands in.
        """
        run = self.run(iteration.run)
        self.check_spread(iteration.run)
        self.check_experts(iteration.run)
        interval = run.save_interval or (schedule and schedule.save_interval)
        previous = (iteration.iteration - 1) // interval * interval if interval else 0
        first = self.first(iteration.run)
        if iteration.iteration <= first:
            raise ConfigError(
                f"run {iteration.run} goes on after iteration {first} of run {run.start_run}; it has no "
                f"iteration {iteration.iteration}",
                hint=f"ask run {run.start_run} for it",
            )
        if previous > first:
            return layout.Iteration(run=iteration.run, iteration=previous)
        if run.start_run and run.start_iteration:
            return layout.Iteration(run=run.start_run, iteration=run.start_iteration)
        return self.sharded(iteration.run)

    def stands(self, export: layout.Export) -> bool:
        """Whether an export is there as config/ and its inputs have it now: nothing makes it again."""
        return Path(export.proof).is_file() and self.is_current(export)

    def is_current(self, artifact: Any) -> bool:
        """Whether an artifact is there as config/ and its inputs have it now."""
        if not Path(artifact.manifest).is_file():
            return False
        found = read_json(artifact.manifest)
        return canonical(found.get("settings")) == self.settings_text(artifact) and all(
            digest_now(path) in (None, was) for path, was in found["inputs"].items()
        )

    def settled(self, artifact: Any, asked: Any) -> bool:
        """Whether a checkpoint or a model stands, and nothing makes it, or one that it comes from, again.

        One that is gone before another that stands is missed by nobody, and so says nothing.

        Args:
            artifact: what a job would make.
            asked: Snakemake's settings of the plan: its targets, and what is forced.
        """
        if not self.is_current(artifact) or _forced(artifact, asked):
            return False
        if isinstance(artifact, layout.Iteration):
            before = [self.start(artifact, self.schedule_as_known(artifact.run))]
        else:
            found = [one for several in self.inputs(artifact).values() for one in several]
            before = [one for one in found if type(one) in MODELS]
        return all(self.settled(one, asked) for one in before if Path(one.manifest).is_file())

    def conversion_parts(self, artifact: Any, known: Iterable[str] | None) -> list[str]:
        """What the jobs say that make a converted model together; nothing where one job makes it.

        Snakemake makes again what was made from other files than a rule lists now. So one that is there as
        config/ has it lists those that it was made from: another ``conversion_jobs`` remakes nothing.

        Args:
            artifact: the model.
            known: what it was made from, as Snakemake recorded it.
        """
        if self.is_current(artifact):
            return [path for path in known or () if path.startswith(f"{artifact.parts}/")]
        jobs = self._model(artifact.model).conversion_jobs
        return [artifact.part(number, jobs) for number in range(1, jobs + 1) if jobs > 1]

    def check_kept(self, export: layout.Export, asked: Any) -> None:
        """Refuse to make an export anew from a checkpoint that was thinned out: the old one would be lost.

        Args:
            export: what a job would make.
            asked: Snakemake's settings of the plan: its targets, and what is forced.

        Raises:
            ConfigError: it is to be made, and its weights were removed; the key that asked for it is named.
        """
        forced = _forced(export, asked, export.proof)
        found = pruned(str(export.iteration)).items()
        gone = [why for name, why in found if not fnmatch(name, layout.OPTIMIZER_FILES)]
        if gone and (forced or not self.stands(export)):
            raise ConfigError(
                f"{export.iteration} has no weights any more: {gone[0]} removed them",
                hint=f"to train it anew, remove it; to keep what stands as {export}, move that away first",
            )

    def around(self, name: str) -> dict[str, Any]:
        """How a run is started and what it tells: keys that change nothing of what is trained."""
        return self.run(name).model_dump(mode="json", include=set(Around.model_fields))

    def evaluated(self, name: str) -> list[layout.Analysis]:
        """The mixture that a run is evaluated on, if it is another.

        The schedule waits for it, not the checkpoints: no change of it trains anything again.
        """
        mixture = self.run(name).eval_mixture
        return [layout.Analysis(mixture=mixture)] if mixture else []

    def asks(self, rule: str, *, run: str | None = None, attempt: int = 1) -> dict[str, Any]:
        """What a job of a rule asks a cluster for; of train, the processes and nodes of its run."""
        sizes = {"processes": self.run(run).world_size, "nodes": self.run(run).nodes} if run else {}
        return self.config.jobs.by_rule[rule].resources(
            **{"processes": 0, "nodes": 1, **sizes}, attempt=attempt, escalates=rule != "train"
        )

    def asked_for(self, rule: str) -> set[str]:
        """The resources that any job of a rule may ask for."""
        runs = self.config.runs if rule == "train" else (None,)
        return {key for run in runs for key in self.asks(rule, run=run)}

    def first(self, name: str) -> int:
        """The iteration after which a run begins: 0, or where the one stopped that it goes on from."""
        run = self.run(name)
        return 0 if run.finetune else int(run.start_iteration or 0)

    # Images

    def image(self, kind: Kind) -> str:
        """The image that a class of rules runs in."""
        return self.config.images.path(kind)

    def containers(self) -> dict[str, str]:
        """What stands in the environment of jobs that run in images."""
        return environment(self.config.model_dump(mode="json", exclude={"images"}))

    # Checks that need no data

    def check_grid(self, sharded: layout.Sharded) -> None:
        """Refuse a grid that the model cannot be cut for.

        Raises:
            ConfigError: it names the number that does not divide.
        """
        where = f"grid tp{sharded.tp} x pp{sharded.pp} cannot hold {sharded.model}"
        for shape in (self.shape(sharded.model), self.tower_shape(sharded.model)):
            _check_axis(where, shape, "tp", sharded.tp, WIDTHS)
        self._check_stages(where, sharded)

    def check_spread(self, name: str) -> None:
        """Refuse a run whose model's layers do not divide as it says.

        Raises:
            ConfigError: it has the factors.
        """
        run = self.run(name)
        layers = self.shape(run.model).get("num_hidden_layers")
        why = layers and undivided(run.model_dump(), layers, self.split(run.model))
        if why:
            raise ConfigError(f"runs.{name} trains {run.model}: {why}")

    def check_experts(self, name: str) -> None:
        """Refuse a run whose keys do not fit its model's experts, or a model without them.

        Raises:
            ConfigError: it prints both.
        """
        run = self.run(name)
        shape = self.shape(run.model)
        unfit = unfit_for_experts(run.model_dump(), shape.get("num_local_experts", 0)) if shape else ""
        if unfit:
            raise ConfigError(f"runs.{name}: {unfit}")

    def _check_stages(self, where: str, sharded: layout.Sharded) -> None:
        """The layers that no key gives to the first or the last stage divide among the other stages."""
        shape, stages = dict(self.shape(sharded.model)), sharded.pp
        uneven = [size for size in self.split(sharded.model).values() if size]
        if not uneven or stages == 1:
            _check_axis(where, shape, "pp", stages, ("num_hidden_layers",))
        elif "num_hidden_layers" in shape:
            layers = shape["num_hidden_layers"]
            left, others = layers - sum(uneven), stages - len(uneven)
            if left < others or (left and others == 0) or (others > 0 and left % others):
                raise ConfigError(
                    f"{where}: of {layers} layers {' + '.join(map(str, uneven))} are given to the first or "
                    f"last stage, and {left} do not divide among the other {others}",
                    hint=f"see num_layers_in_first_pipeline_stage and its fellow in models.{sharded.model}",
                )

    def split(self, model: str) -> dict[str, int | None]:
        """Layers of the first and the last stage of a model's pipelines; None where they are even."""
        found: dict[str, int | None] = self._model(model).model_dump(include=SPLIT)
        return found

    def _model(self, name: str) -> Model:
        """The keys of a converted model."""
        return self.config.models.get(name) or Model(source=self.hf(name).model)

    def shape(self, model: str) -> dict[str, int]:
        """The sizes that a grid must divide, as far as they are known before the model exists."""
        return self._shape_of(self._root(self.hf(model).model), "text_config")

    def tower_shape(self, model: str) -> dict[str, int]:
        """The same sizes of a LLaVA model's vision tower; empty where there is none, or none is known."""
        source = self.config.raw_hf[self.hf(model).model]
        if isinstance(source, LlavaModel):
            return self._shape_of(self._root(source.vision), "vision_config")
        whole = isinstance(source, FolderModel | HubModel)
        return self._shape_of(source, "vision_config", {}) if whole else {}

    def projector_size(self, model: str) -> int:
        """Inner size of a LLaVA model's projector: the language model's width, where nothing else is said."""
        source = self.config.raw_hf[self.hf(model).model]
        said = source.projector_hidden_size if isinstance(source, LlavaModel) else None
        if isinstance(source, FolderModel | HubModel):
            path = self.config_file(source)
            said = read_json(path).get("projector_hidden_size") if path.is_file() else None
        return int(said or self.shape(model).get("hidden_size", 0))

    def _root(self, name: str) -> Any:
        """The entry of raw_hf that a model's sizes come from."""
        source = self.config.raw_hf[name]
        while not isinstance(source, InitSizes | FolderModel | HubModel | TowerModel | GgufModel):
            source = self.config.raw_hf[source.base]
        return source

    def _shape_of(self, source: Any, part: str, otherwise: Any = None) -> dict[str, int]:
        if isinstance(source, InitSizes | TowerModel):
            return {key: value for key, value in source if isinstance(value, int)}
        path = self.config_file(source)
        config = read_json(path) if path.is_file() else {}
        found: dict[str, int] = config.get(part, config if otherwise is None else otherwise)
        return found

    def config_file(self, source: Any) -> Path:
        """The config.json of a folder, of a model of the hub or of a GGUF file; it may not be here yet."""
        if isinstance(source, HubModel):
            commit = self.lock.commit(source) or "0" * 40
            return Path(str(layout.HubFile(repo=source.tree.repo, commit=commit, file="config.json")))
        if isinstance(source, GgufModel):
            name = next(name for name, one in self.config.raw_hf.items() if one == source)
            return Path(str(layout.HfModel(model=name))) / "config.json"
        return local(source.path) / "config.json"

    def schedule(self, name: str, instances: int | None = None) -> Schedule | None:
        """The run's length and save interval; None where they wait for the data.

        Args:
            name: the run.
            instances: packed sequences in its mixture, where they are known.
        """
        return Schedule.of(self.run(name).model_dump(), instances, sequence=self.sequence(name))

    def sequence(self, name: str) -> int:
        """Tokens of a sequence that a run trains on."""
        mixture = self.config.mixtures[self.run(name).mixture]
        return int(mixture.pack or mixture.decoder_seq_length or 0)

    def schedule_as_known(self, name: str) -> Schedule | None:
        """The run's schedule as config/ gives it, or as schedule.json holds it for this config."""
        run = layout.Run(run=name)
        known = self.schedule(name)
        if known is None and Path(run.schedule).is_file():
            return Schedule.read(run.schedule, self.settings(run))
        return known

    # Settings

    def mixture_settings(self, analysis: layout.Analysis) -> dict[str, Any]:
        """A mixture's settings; where energon reads it, those of its format too: no shard holds them."""
        mixture = _known("mixture", analysis.mixture, self.config.mixtures)
        if mixture.pack:
            return {"mixture": _dump(mixture)}
        return {
            "mixture": _dump(mixture),
            "format": _dump(self.config.formats[mixture.format]),
            "image_token_id": picture_token(self.config, analysis.mixture),
        }

    def settings(self, artifact: layout.Artifact, stage: str = "") -> dict[str, Any]:
        """What decides the content of an artifact besides its inputs."""
        stage = stage or STAGE_OF[type(artifact)]
        slice_ = SLICES[stage](self, artifact) if stage in SLICES else {}
        return {"stage": stage, "version": VERSIONS[stage], **slice_}

    def adopted(self, artifact: layout.Artifact) -> bool:
        """Whether something that plait did not make was adopted for an artifact.

        Raises:
            ConfigError: it was adopted as something else than the config has now, or is given and was not
                adopted yet.
        """
        manifest, given = adopted(artifact), self.config.given.get(str(artifact))
        if manifest is None and given:
            raise ConfigError(
                f"{artifact} is given in config/, as {given}, and was not adopted yet",
                hint=f"plait adopt {artifact}",
            )
        if manifest is None or getattr(artifact, "run", None) not in {None, *self.config.runs}:
            return manifest is not None
        always = {"version": 0, "commit": ""}
        was, now = ({**found, **always} for found in (manifest["settings"], self.settings(artifact)))
        other = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        if other:
            raise ConfigError(
                f"{artifact} was adopted with another {', '.join(other)} than config/ has now",
                hint=f"bring that back, or remove {artifact.manifest} and adopt it again",
            )
        return True

    def left_alone(self, artifact: layout.Artifact, asked: Any) -> bool:
        """Whether an artifact was adopted, so that its job gets no inputs and never starts.

        Snakemake removes the outputs of a job before it starts. This job has no input that could be newer
        and, since it never ran here, no record to differ from; what would force it is refused.

        Args:
            artifact: what a job would make.
            asked: Snakemake's settings of the plan: its targets, and what is forced.

        Raises:
            ConfigError: it is to be made by force, or was adopted as something else than config/ has now.
        """
        if not self.adopted(artifact):
            return False
        if _forced(artifact, asked):
            raise ConfigError(
                f"{artifact} was adopted, and nothing is made in its place", hint="move it away"
            )
        return True

    def settings_text(self, artifact: layout.Artifact, stage: str = "") -> str:
        """The settings as one canonical JSON text."""
        if type(artifact) not in layout.BATCHES:
            return canonical(self.settings(artifact, stage))
        one: Any = artifact  # those of all shards are the same, and there may be thousands
        key = (replace(one, shard=0), stage)
        if key not in self._texts:
            self._texts[key] = canonical(self.settings(artifact, stage))
        return self._texts[key]


# What each kind of artifact is made from.
INPUTS: dict[type[layout.Artifact], Callable[[Plan, Any], dict[str, Any]]] = {
    layout.HubTree: lambda _plan, _it: {},
    layout.HubFile: lambda _plan, _it: {},
    layout.Raw: lambda plan, it: {"files": plan.sources(it)},
    layout.Chat: lambda plan, it: {"raw": [plan.raw(it)]},
    layout.ChatBatch: lambda plan, it: {"raw": [plan.raw(it.shards[-1])]},
    layout.Tokenizer: lambda plan, it: {"base": plan.base_tokenizer(it)},
    layout.Indexed: lambda plan, it: {"tokenizer": [plan.tokenizer_of(it)], "chats": plan.chats(it)},
    layout.IndexedBatch: lambda plan, it: {
        "tokenizer": [plan.tokenizer_of(it)],
        "chats": [chat for one in it.shards for chat in plan.chats(one)],
    },
    layout.Energon: lambda plan, it: plan.shards(it),
    layout.Analysis: lambda plan, it: plan.mixed(it),
    layout.HfModel: lambda plan, it: {"parts": plan.parts(it), "files": plan.fetched(f"raw_hf.{it.model}")},
    layout.Megatron: lambda plan, it: {"hf": [plan.hf(it.model)]},
    layout.Sharded: lambda plan, it: {"megatron": [plan.uncut(it)]},
    layout.Run: lambda plan, it: {"analysis": [plan.analysis(it.run)], "evaluated": plan.evaluated(it.run)},
    layout.Iteration: lambda plan, it: {
        "analysis": [plan.analysis(it.run)],
        **plan.mixed(plan.analysis(it.run)),
    },
    layout.Export: lambda plan, it: {
        "hf": [plan.hf(plan.run(it.run).model)],
        "iteration": [it.iteration],
    },
    layout.LossCurve: lambda plan, it: {"iterations": plan.drawn(it)},
    layout.Generated: lambda plan, it: {"export": [plan.asked(it)]},
}

# The part of the config that decides what a stage writes.
ENERGON_KEYS = {"energon", "source"}
CHAT_KEYS = {"source", "shards", "pictures", "reject_limit"}
SCHEDULE_KEYS = {
    "recipe", "epochs", "train_iters", "train_tokens", "save_interval", "save_every", "global_batch_size",
}  # fmt: skip
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
NOT_TRAIN_KEYS = {
    "exports",
    "generate",
    *Around.model_fields,
    *SCHEDULE_KEYS - {"recipe", "global_batch_size"},
}
SLICES: dict[str, Callable[[Plan, Any], dict[str, Any]]] = {
    "fetch": lambda plan, it: {"file": plan.fetching(it)},
    "raw": lambda plan, it: {
        "source": _dump(plan.dataset(it.dataset).source),
        **plan.commit(plan.dataset(it.dataset).source),
        **plan.told(it.dataset),
    },
    "chat": lambda plan, it: {
        **plan.dataset(it.dataset).model_dump(mode="json", include=CHAT_KEYS),
        **plan.told(it.dataset),
    },
    "tokenizer": lambda plan, it: {
        "source": _dump(_known("tokenizer", it.tokenizer, plan.config.tokenizers))
    },
    "index": lambda plan, it: {
        "format": _dump(_known("format", it.format, plan.config.formats)),
        **plan.taken(it.dataset),
    },
    "energon": lambda plan, it: {
        **plan.dataset(it.dataset).model_dump(mode="json", include=ENERGON_KEYS),
        **plan.taken(it.dataset),
    },
    "analyse": lambda plan, it: plan.mixture_settings(it),
    "build": lambda plan, it: {
        "source": _dump(_known("raw_hf", it.model, plan.config.raw_hf)),
        **plan.commit(plan.config.raw_hf[it.model]),
    },
    "shard": lambda plan, it: plan.split(it.model),
    "schedule": lambda plan, it: {
        **plan.run(it.run).model_dump(mode="json", include=SCHEDULE_KEYS),
        "seq_length": plan.sequence(it.run),
    },
    "train": lambda plan, it: {
        **plan.run(it.run).model_dump(mode="json", exclude=NOT_TRAIN_KEYS),
        **plan.split(plan.run(it.run).model),
    },
    "verify": lambda plan, it: plan.proof(it.model if hasattr(it, "model") else plan.run(it.run).model),
    "export": lambda plan, it: {
        "recipe": plan.run(it.run).recipe,
        "template": plan.template(it.run),
        **plan.proof(plan.run(it.run).model),
    },
    "report": lambda plan, it: dict(plan.run(it.run).model_dump(mode="json", include={"exports"})),
    "generate": lambda plan, it: dict(plan.run(it.run).model_dump(mode="json", include={"generate"})),
}

STAGE_OF: dict[type[layout.Artifact], str] = {
    layout.HubTree: "lock",
    layout.HubFile: "fetch",
    layout.Raw: "raw",
    layout.Chat: "chat",
    layout.ChatBatch: "chat",
    layout.Tokenizer: "tokenizer",
    layout.Indexed: "index",
    layout.IndexedBatch: "index",
    layout.Energon: "energon",
    layout.Analysis: "analyse",
    layout.HfModel: "build",
    layout.Megatron: "convert",
    layout.Sharded: "shard",
    layout.Run: "schedule",
    layout.Iteration: "train",
    layout.Export: "export",
    layout.LossCurve: "report",
    layout.Generated: "generate",
}


def _known(what: str, name: str, among: Any) -> Any:
    if name not in among:
        raise ConfigError(
            f"there is no {what} {name!r} in config/",
            hint=f"known: {', '.join(sorted(among)) or 'none'}",
        )
    return among[name]


def _forced(artifact: Any, asked: Any, *more: str) -> bool:
    """Whether the user has an artifact made again, whatever stands there: by its rule, by a file, or all."""
    stage, outputs = STAGE_OF[type(artifact)], {str(artifact), artifact.manifest, *more}
    rule = "model" if stage == "build" else stage
    by_name = asked.forcetargets and not outputs.isdisjoint(asked.targets)
    return bool(asked.forceall or by_name or not {rule, *outputs}.isdisjoint(asked.forcerun or ()))


def _check_axis(where: str, shape: dict[str, int], axis: str, size: int, keys: tuple[str, ...]) -> None:
    for key in keys:
        if key in shape and shape[key] % size:
            legal = [n for n in range(1, shape[key] + 1) if not any(shape.get(k, n) % n for k in keys)]
            raise ConfigError(
                f"{where}: {key} {shape[key]} is not a multiple of {axis} {size}",
                hint=f"{axis} may be {', '.join(map(str, legal))}",
            )


def _check_shard(dataset: str, shard: int, shards: int) -> None:
    if shard >= shards:
        raise ConfigError(f"dataset {dataset} has shards 00000 to {shards - 1:05d}; {shard:05d} is beyond")


def _dump(model: Any) -> Any:
    return None if model is None else model.model_dump(mode="json")
