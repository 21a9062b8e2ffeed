"""Whether what a run names fits together: its recipe, its model and the format of its data."""

import math
import re
from typing import TYPE_CHECKING, Any

from plait.config.paths import SPLIT, local
from plait.config.run import FP8_TOKENS, needs_engine, pieces_of_sequence
from plait.config.schedule import LLAVA

if TYPE_CHECKING:
    from collections.abc import Iterable

    from plait.config.model import Config, Energon, Format, HfSource, LlavaModel, Mixture, SoloModel
    from plait.config.run import Run

ELSEWHERE = ("folder", "hub")
"""Models whose content config/ does not know; the trainer compares digests."""
MODELS = {
    "chat": ("init", "init_mixtral", "gguf", "extend", *ELSEWHERE),
    "solo": ("solo", *ELSEWHERE),
    "llava": ("llava", *ELSEWHERE),
    "llava_jp": ("llava", *ELSEWHERE),
}
"""The kinds of model that each recipe trains."""
PICTURE_TEMPLATES = ("llava", "jp_alpaca")
READERS = {"pack": "packed sequences", "decoder_seq_length": "energon"}
"""The key of a mixture that says who reads it."""
ONLY = {
    "pack": ("packing", "overlong", "pictures", "patch_size", "max_resolution"),
    "decoder_seq_length": ("instruction", "language", "picture_tokens"),
}
"""Keys of a format that only one reader heeds."""
LLAVA_ONLY = (
    "freeze", "stage", "num_workers", "data_streams", "shuffle_buffer_size", "max_samples_per_sequence",
)  # fmt: skip
"""Keys of a run that only recipes of energon's data heed."""
SAME_ORDER = ("mixture", "seed", "global_batch_size")
"""Keys that decide which samples an iteration sees."""
SAME_OPTIMIZER = ("optimizer", "params_dtype", "use_distributed_optimizer", "freeze")
"""Keys that decide what an optimizer's state is made of."""
SAME_PLACE = ("micro_batch_size", "num_workers", "shuffle_buffer_size", "max_samples_per_sequence")
"""Keys that energon's place in its data belongs to."""
LANGUAGE_MODELS = ("init", "gguf", "extend", *ELSEWHERE)
TOWERS = ("init_tower", *ELSEWHERE)
"""Kinds of raw_hf that a LLaVA's base and tower can be of."""
WITH_TOKENIZER = ("hub", "folder", "gguf")
OF_RECORDS = ("pictures", "reject_limit")
"""Keys of a dataset that only its own chat records heed."""
OF_WRITING = ("layout", "shard_name", "samples_per_shard")
"""Keys of energon that only tars heed which are written here."""


def check_tokenizer(config: "Config", name: str) -> None:
    """Refuse a tokenizer that would be taken from a model which is made from one.

    Raises:
        ValueError: a sentence that names both.
    """
    source = config.tokenizers[name]
    if source.kind == "model" and config.raw_hf[source.model].kind not in WITH_TOKENIZER:
        kind = config.raw_hf[source.model].kind
        raise ValueError(
            f"tokenizers.{name} is that of raw_hf.{source.model}, whose kind is {kind!r}; "
            f"only models of kind {' or '.join(WITH_TOKENIZER)} bring one"
        )


def check_energon(given: "Energon") -> None:
    """Refuse what no dataset could be prepared by.

    Raises:
        ValueError: a sentence that names the key.
    """
    for pattern in (*given.split_parts.values(), given.exclude):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    if not given.split[0] > 0 or not all(map(math.isfinite, given.split)):
        raise ValueError(f"split {list(given.split)} gives training no share; e.g. [9, 1, 0]")
    if given.split_parts:
        _refuse_ignored("energon", given, ("split",), "`split_parts` stands in its place")
        if "train" not in given.split_parts:
            raise ValueError(f"split_parts names {', '.join(given.split_parts)} and leaves train no shard")
    if given.sample_type == "CrudeWebdataset":
        _refuse_ignored("energon", given, ("field_map",), "a CrudeWebdataset is read whole")


def check_dataset(config: "Config", name: str) -> None:
    """Refuse a dataset with keys that nothing reads.

    Raises:
        ValueError: a sentence that names the key.
    """
    dataset, where = config.datasets[name], f"datasets.{name}"
    if dataset.source is None:
        _refuse_ignored(where, dataset, OF_RECORDS, "it packs records of others, by their keys")
    if dataset.source and dataset.source.kind == "energon":
        prepared = "its source is prepared already"
        _refuse_ignored(where, dataset, ("shards", "by_hash", "duplicates", *OF_RECORDS), prepared)
        _refuse_ignored(f"{where}.energon", dataset.energon, OF_WRITING, prepared)
        if (local(dataset.source.path) / SPLIT).is_file():
            why = f"{dataset.source.path} has a {SPLIT}; split_parts goes before it"
            _refuse_ignored(f"{where}.energon", dataset.energon, ("split",), why)
    packed, read = _readers(config)
    if name in packed - read:
        keys, why = type(dataset.energon).model_fields, "mixtures only pack its records"
        _refuse_ignored(f"{where}.energon", dataset.energon, keys, why)


def _readers(config: "Config") -> tuple[set[str], set[str]]:
    """The datasets that mixtures pack, those within others too, and those that energon reads."""
    packed: set[str] = set()
    read: set[str] = set()
    for mixture in config.mixtures.values():
        (packed if mixture.pack else read).update(mixture.names, mixture.validation)
    for name in packed | read:
        packed.update(config.datasets[name].pack_together)
    return packed, read


def check_mixture(config: "Config", name: str) -> None:
    """Refuse a mixture whose reader would ignore what its format or its datasets say.

    Raises:
        ValueError: a sentence that names both sides.
    """
    mixture = config.mixtures[name]
    form = config.formats[mixture.format]
    reader = "pack" if mixture.pack else "decoder_seq_length"
    ignored = [key for other in ONLY if other != reader for key in ONLY[other]]
    _refuse_ignored(f"formats.{mixture.format}", form, ignored, f"mixtures.{name} reads {READERS[reader]}")
    if form.instruction != "drawn":
        _refuse_ignored(f"formats.{mixture.format}", form, ("language",), "its `instruction` is not drawn")
    prepared = [
        one for one in mixture.names if getattr(config.datasets[one].source, "kind", None) == "energon"
    ]
    for one in mixture.validation:
        for other in set(mixture.names) - {one}:
            _check_apart(config, f"mixtures.{name}", other, one)
    if mixture.pack and prepared:
        raise ValueError(
            f"mixtures.{name} packs datasets.{prepared[0]}, which is prepared for energon and has no "
            "records; name its tars as a source of kind tars, or give the mixture `decoder_seq_length`"
        )


def _check_apart(config: "Config", where: str, trained: str, validated: str) -> None:
    """Two datasets are of different records, or the two parts of the same.

    Raises:
        ValueError: a record would train and validate.
    """
    ours, theirs = (config.datasets[name] for name in (trained, validated))
    both = {*(ours.pack_together or [trained])} & {*(theirs.pack_together or [validated])}
    one, other = ours.by_hash, theirs.by_hash
    apart = one and other and one.part != other.part and one.validation == other.validation
    if both and not apart:
        raise ValueError(
            f"{where} trains datasets.{trained} and validates by datasets.{validated}, and both are of the "
            f"records of {min(both)}: give each the `by_hash` of another part, with one share"
        )


def _refuse_ignored(where: str, given: Any, ignored: "Iterable[str]", reader: str) -> None:
    """No key has a value of its own that nothing reads."""
    defaults = type(given).model_fields
    found = [key for key in ignored if getattr(given, key) != defaults[key].default]
    if found:
        value = getattr(given, found[0])
        raise ValueError(f"{where} has {found[0]} {value!r}, which nothing reads: {reader}")


def check_model(config: "Config", name: str) -> None:
    """Refuse a LLaVA whose parts are of kinds that they cannot be.

    What a model of kind ``folder`` or ``hub`` is made of is not known here; ``plait build`` looks.

    Raises:
        ValueError: a sentence that names both.
    """
    source = config.raw_hf[name]
    if source.kind != "llava":
        return
    for key, kinds in {"base": LANGUAGE_MODELS, "vision": TOWERS}.items():
        part = getattr(source, key)
        if part in config.raw_hf and config.raw_hf[part].kind not in kinds:
            raise ValueError(
                f"raw_hf.{name} has {key} {part!r} of kind {config.raw_hf[part].kind!r}; it can be of kind "
                f"{', '.join(kinds)}"
            )
    tokenizer = config.tokenizers.get(source.tokenizer)
    ids = (source.image_token_id, source.pad_token_id)
    if ids[0] is not None and ids[0] == ids[1]:
        raise ValueError(
            f"raw_hf.{name} has {ids[0]} as image_token_id and as pad_token_id; they must differ"
        )
    if None in ids and tokenizer and tokenizer.kind == "extend" and "image" not in tokenizer.add:
        raise ValueError(
            f"raw_hf.{name} has tokenizer {source.tokenizer!r}, which adds {', '.join(tokenizer.add)} and no "
            "`image`: a LLaVA needs <image> and <pad>, or ids of others as image_token_id and pad_token_id"
        )
    if source.projector:
        why = "its projector comes from a file"
        _refuse_ignored(f"raw_hf.{name}", source, ("initializer_range",), why)


def check_run(config: "Config", name: str) -> None:
    """Refuse a run whose model would read its data wrongly.

    What a model of kind ``folder``, ``hub`` or ``gguf`` is made of is not known here; the trainer compares
    digests.

    Raises:
        ValueError: a sentence that names both sides.
    """
    run = config.runs[name]
    model = _source_name(config, run.model)
    source, mixture = config.raw_hf[model], config.mixtures[run.mixture]
    form = config.formats[mixture.format]
    unread = needs_engine(run.model_dump())
    if unread:
        raise ValueError(f"runs.{name}: {unread}; leave it out")
    if run.tp_comm_overlap and not run.sequence_parallel:
        raise ValueError(f"runs.{name}: `tp_comm_overlap` needs `sequence_parallel`")
    _check_recipe(config, name, run, model)
    _check_reader(name, run, mixture, form)
    _check_start(config, name, run)
    _check_goes_on(config, name, run)
    _check_length(name, run, mixture)
    _check_evaluation(config, name, run)
    if source.kind in WITH_TOKENIZER:
        return
    tokenizer = getattr(source, "tokenizer", None)
    if tokenizer != form.tokenizer:
        raise ValueError(
            f"runs.{name} trains raw_hf.{model}, whose tokenizer is {tokenizer!r}, on "
            f"formats.{mixture.format}, whose tokenizer is {form.tokenizer!r}; they must be one"
        )
    if source.kind == "solo":
        _check_pictures(name, model, source, mixture.format, form)
    if source.kind == "llava":
        _check_picture_token(config, name, run)
        _check_picture_tokens(config, name, model, source, form)
        _check_projector(name, run, model, source)


def _source_name(config: "Config", model: str) -> str:
    return config.models[model].source if model in config.models else model


def _check_recipe(config: "Config", name: str, run: "Run", model: str) -> None:
    """A recipe has use for some kinds of model only, whatever their vocabulary was extended by."""
    kind, root = config.raw_hf[model].kind, _root(config, model).kind
    if root not in MODELS[run.recipe] or kind not in MODELS[run.recipe]:
        over = f" over {root!r}" if root != kind else ""
        fitting = [recipe for recipe, kinds in MODELS.items() if root in kinds]
        raise ValueError(
            f"runs.{name} has recipe {run.recipe!r} and trains raw_hf.{model} of kind {kind!r}{over}; "
            f"recipe {run.recipe!r} trains kinds {', '.join(MODELS[run.recipe])}, and such a model is "
            f"trained by {', '.join(fitting) or 'none'}"
        )
    if run.recipe not in LLAVA:
        _refuse_ignored(f"runs.{name}", run, LLAVA_ONLY, f"its recipe is {run.recipe!r}")
    else:
        _refuse_ignored(f"runs.{name}", run, ("loss_roles",), f"recipe {run.recipe!r} trains answers")
    if run.init != "random":
        _refuse_ignored(f"runs.{name}", run, ("init_method_std",), "its `init` is not random")
    pictured = [one.image for one in run.generate if one.image]
    if pictured and root.startswith("init"):
        raise ValueError(f"runs.{name} asks about {pictured[0]}, and raw_hf.{model} sees no pictures")


def _root(config: "Config", model: str) -> "HfSource":
    """The model under those that only lengthen the vocabulary."""
    source, seen = config.raw_hf[model], {model}
    while source.kind == "extend" and source.base not in seen:
        seen.add(source.base)
        source = config.raw_hf[source.base]
    return source


def _check_reader(name: str, run: "Run", mixture: "Mixture", form: "Format") -> None:
    """LLaVA reads by energon, the others read packed sequences."""
    key = "decoder_seq_length" if run.recipe in LLAVA else "pack"
    if getattr(mixture, key) is None:
        raise ValueError(
            f"runs.{name} has recipe {run.recipe!r}, whose mixture must have `{key}`; "
            f"mixtures.{run.mixture} has none"
        )
    if run.recipe not in LLAVA:
        if set(run.loss_roles) - {"assistant"} and form.no_loss == "reject":
            raise ValueError(
                f"runs.{name} trains what {', '.join(run.loss_roles)} say, and formats.{mixture.format} "
                "rejects samples in which no assistant speaks: give it `no_loss: count`"
            )
        return
    if form.template not in PICTURE_TEMPLATES or form.picture_tokens is None:
        raise ValueError(
            f"runs.{name} has recipe {run.recipe!r}: formats.{mixture.format} needs `picture_tokens` and a "
            f"template that writes <image>: {' or '.join(PICTURE_TEMPLATES)}"
        )


def _check_length(name: str, run: "Run", mixture: "Mixture") -> None:
    """Ranks that share sequences share them evenly."""
    pieces = pieces_of_sequence(run.model_dump())
    length = mixture.pack or mixture.decoder_seq_length or 0
    if length % pieces:
        tensor = run.tensor_model_parallel_size if run.sequence_parallel else 1
        sixteens = f" x {FP8_TOKENS} of fp8" if run.fp8 else ""
        raise ValueError(
            f"runs.{name}: sequences of {length} tokens do not divide into {pieces} pieces "
            f"(sequence_parallel over {tensor} x twice context_parallel_size "
            f"{run.context_parallel_size}{sixteens})"
        )


def _check_evaluation(config: "Config", name: str, run: "Run") -> None:
    """What is evaluated is read as what is trained, and is none of it."""
    if run.eval_interval is None:
        return
    trained = config.mixtures[run.mixture]
    if run.eval_mixture is None:
        if trained.pack:
            raise ValueError(
                f"runs.{name} has eval_interval {run.eval_interval} and packed data, which have no val "
                "split: name other data as `eval_mixture`"
            )
        return
    evaluated = config.mixtures[run.eval_mixture]
    for key in ("format", "pack", "decoder_seq_length"):
        ours, theirs = getattr(trained, key), getattr(evaluated, key)
        if ours != theirs:
            raise ValueError(
                f"runs.{name} trains on mixtures.{run.mixture} with {key} {ours!r} and evaluates "
                f"mixtures.{run.eval_mixture} with {theirs!r}; they must be equal"
            )
    both = sorted(set(trained.names) & set(evaluated.names))
    if trained.pack and both:
        raise ValueError(
            f"runs.{name} trains on datasets.{both[0]} and evaluates it too, by mixtures.{run.eval_mixture}"
        )
    for ours in trained.names if trained.pack else ():
        for theirs in evaluated.names:
            _check_apart(config, f"runs.{name}", ours, theirs)


def _check_start(config: "Config", name: str, run: "Run") -> None:
    """A run starts from a run of the same model, and no run from itself."""
    seen, before = {name}, run.start_run
    while before in config.runs:
        if before in seen:
            raise ValueError(f"runs.{name} starts from itself, by way of start_run {run.start_run!r}")
        seen.add(before)
        before = config.runs[before].start_run
    if run.start_run and config.runs[run.start_run].model != run.model:
        raise ValueError(
            f"runs.{name} trains {run.model} and starts from runs.{run.start_run}, which trains "
            f"{config.runs[run.start_run].model}; they must be one model"
        )


def _check_goes_on(config: "Config", name: str, run: "Run") -> None:
    """A run that goes on where another stopped sees the samples that come next, and no others."""
    if run.finetune or not run.start_run:
        return
    before = config.runs[run.start_run]
    for key in SAME_ORDER + (SAME_PLACE if run.recipe in LLAVA else ()):
        ours, theirs = getattr(run, key), getattr(before, key)
        if ours != theirs:
            raise ValueError(
                f"runs.{name} goes on where runs.{run.start_run} stopped, and has {key} {ours!r}, not "
                f"{theirs!r}; with another the samples would be others"
            )
    streams = data_streams(config, run.start_run)
    if run.data_streams not in (None, streams):
        raise ValueError(
            f"runs.{name} goes on where runs.{run.start_run} stopped, and has data_streams "
            f"{run.data_streams}, not {streams}; with another the samples would be others"
        )
    for key in SAME_OPTIMIZER if run.load_optim else ():
        ours, theirs = getattr(run, key), getattr(before, key)
        if ours != theirs:
            raise ValueError(
                f"runs.{name} goes on with the optimizer of runs.{run.start_run}, and has {key} {ours!r}, "
                f"not {theirs!r}; `load_optim: false` begins a new one"
            )


def data_streams(config: "Config", name: str) -> int:
    """Into how many streams energon deals the samples of a run."""
    run = config.runs[name]
    if run.finetune or not run.start_run:
        return run.data_streams or run.data_parallel_size
    return data_streams(config, run.start_run)


def _check_pictures(name: str, model: str, source: "SoloModel", format_: str, form: "Format") -> None:
    """A model must see pictures as its data have them."""
    for key in ("patch_size", "max_resolution"):
        ours, theirs = getattr(source, key), getattr(form, key)
        if ours != theirs:
            raise ValueError(
                f"runs.{name} trains raw_hf.{model} with {key} {ours} on formats.{format_} "
                f"with {key} {theirs}; they must be equal"
            )


def picture_token(config: "Config", mixture: str) -> int | None:
    """The id that stands for a picture in what is made of a mixture; None: its tokenizer's own."""
    return next((_token_of(config, run) for run in config.runs.values() if mixture in _read_by(run)), None)


def _read_by(run: "Run") -> set[str | None]:
    """The mixtures that a run trains on and is evaluated on."""
    return {run.mixture, run.eval_mixture} - {None}


def _token_of(config: "Config", run: "Run") -> int | None:
    return getattr(config.raw_hf[_source_name(config, run.model)], "image_token_id", None)


def _check_picture_token(config: "Config", name: str, run: "Run") -> None:
    """All models that read a mixture have one token for a picture: its samples are counted once."""
    ours = _token_of(config, run)
    for other, one in config.runs.items():
        theirs, both = _token_of(config, one), _read_by(run) & _read_by(one)
        if both and theirs != ours:
            raise ValueError(
                f"runs.{name} and runs.{other} read mixtures.{min(map(str, both))}, and their models have "
                f"image_token_id {ours} and {theirs}; give each a mixture of its own, or both one id"
            )


def _check_picture_tokens(
    config: "Config", name: str, model: str, source: "LlavaModel", form: "Format"
) -> None:
    """A picture takes as many tokens as the tower gives features."""
    tower: Any = config.raw_hf[source.vision]
    if tower.kind != "init_tower":
        return
    tokens = (tower.image_size // tower.patch_size) ** 2
    tokens += tower.architecture == "clip" and not source.drop_class_token
    if tokens != form.picture_tokens:
        raise ValueError(
            f"runs.{name} trains raw_hf.{model}, whose tower gives {tokens} features a picture, on a format "
            f"with picture_tokens {form.picture_tokens}; they must be equal"
        )


def _check_projector(name: str, run: "Run", model: str, source: "LlavaModel") -> None:
    """Tensor parallel ranks share the projector's inner features."""
    inner, tp = source.projector_hidden_size, run.tensor_model_parallel_size
    if inner is not None and inner % tp:
        raise ValueError(
            f"runs.{name} trains raw_hf.{model} with projector_hidden_size {inner}, which is not a multiple "
            f"of tensor_model_parallel_size {tp}"
        )
