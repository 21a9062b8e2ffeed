"""Whether what a run names fits together: its recipe, its model and the format of its data."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.config.model import Config, Format, HfSource, Run, SoloModel


def check_run(config: "Config", name: str) -> None:
    """Refuse a run whose model would read its data wrongly.

    What a model of kind ``folder`` is made of is not known here; the trainer compares digests.

    Raises:
        ValueError: a sentence that names both sides.
    """
    run = config.runs[name]
    model = config.models[run.model].source if run.model in config.models else run.model
    source, format_ = config.raw_hf[model], config.mixtures[run.mixture].format
    form = config.formats[format_]
    _check_recipe(config, name, run, model)
    if source.kind == "folder":
        return
    if source.tokenizer != form.tokenizer:
        raise ValueError(
            f"runs.{name} trains raw_hf.{model}, whose tokenizer is {source.tokenizer!r}, on "
            f"formats.{format_}, whose tokenizer is {form.tokenizer!r}; they must be one"
        )
    if source.kind == "solo":
        _check_pictures(name, model, source, format_, form)


def _check_recipe(config: "Config", name: str, run: "Run", model: str) -> None:
    """A run of recipe solo needs a SOLO model; one of recipe chat has no use for its projection."""
    kind = config.raw_hf[model].kind
    if run.recipe == "solo" and kind not in ("solo", "folder"):
        raise ValueError(
            f"runs.{name} has recipe 'solo' and trains raw_hf.{model} of kind {kind!r}; "
            "its model must be of kind 'solo' or 'folder'"
        )
    if run.recipe == "chat" and _root(config, model).kind == "solo":
        raise ValueError(
            f"runs.{name} has recipe 'chat' and trains raw_hf.{model}, a SOLO model; "
            "its recipe must be 'solo'"
        )


def _root(config: "Config", model: str) -> "HfSource":
    """The model under those that only lengthen the vocabulary."""
    source, seen = config.raw_hf[model], {model}
    while source.kind == "extend" and source.base not in seen:
        seen.add(source.base)
        source = config.raw_hf[source.base]
    return source


def _check_pictures(name: str, model: str, source: "SoloModel", format_: str, form: "Format") -> None:
    """A model must see pictures as its data have them."""
    for key in ("patch_size", "max_resolution"):
        ours, theirs = getattr(source, key), getattr(form, key)
        if ours != theirs:
            raise ValueError(
                f"runs.{name} trains raw_hf.{model} with {key} {ours} on formats.{format_} "
                f"with {key} {theirs}; they must be equal"
            )
