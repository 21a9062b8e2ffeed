"""Whether what a run names fits together: its recipe, its model and the format of its data."""

from typing import TYPE_CHECKING, Any

from plait.config.schedule import LLAVA

if TYPE_CHECKING:
    from plait.config.model import Config, Format, HfSource, LlavaModel, Mixture, Run, SoloModel

ELSEWHERE = ("folder", "hub")
"""Models whose content config/ does not know; the trainer compares digests."""
MODELS = {
    "chat": ("init", "extend", *ELSEWHERE),
    "solo": ("solo", *ELSEWHERE),
    "llava": ("llava", *ELSEWHERE),
    "llava_jp": ("llava", *ELSEWHERE),
}
"""The kinds of model that each recipe trains."""
PICTURE_TEMPLATES = ("llava", "jp_alpaca")


def check_run(config: "Config", name: str) -> None:
    """Refuse a run whose model would read its data wrongly.

    What a model of kind ``folder`` or ``hub`` is made of is not known here; the trainer compares digests.

    Raises:
        ValueError: a sentence that names both sides.
    """
    run = config.runs[name]
    model = _source_name(config, run.model)
    source, mixture = config.raw_hf[model], config.mixtures[run.mixture]
    form = config.formats[mixture.format]
    _check_recipe(config, name, run, model)
    _check_reader(name, run, mixture, form)
    _check_start(config, name, run)
    if source.kind in ELSEWHERE:
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
        _check_picture_tokens(config, name, model, source, form)


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
    if run.recipe not in LLAVA and (run.freeze or run.stage):
        raise ValueError(f"runs.{name} has recipe {run.recipe!r}; `freeze` and `stage` are LLaVA's")


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
        return
    if form.template not in PICTURE_TEMPLATES or form.picture_tokens is None:
        raise ValueError(
            f"runs.{name} has recipe {run.recipe!r}: formats.{mixture.format} needs `picture_tokens` and a "
            f"template that writes <image>: {' or '.join(PICTURE_TEMPLATES)}"
        )


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


def _check_pictures(name: str, model: str, source: "SoloModel", format_: str, form: "Format") -> None:
    """A model must see pictures as its data have them."""
    for key in ("patch_size", "max_resolution"):
        ours, theirs = getattr(source, key), getattr(form, key)
        if ours != theirs:
            raise ValueError(
                f"runs.{name} trains raw_hf.{model} with {key} {ours} on formats.{format_} "
                f"with {key} {theirs}; they must be equal"
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
