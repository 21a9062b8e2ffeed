"""A family of language models as a table: which fields its config.json has, and what becomes of each.

A field is read into a field of Spec, is known to decide no number (:data:`INERT` and ``inert``), is refused
at some values by a sentence, or is unknown and then refused by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plait.errors import CheckpointError
from plait.models.families import rope
from plait.models.families.fields import (
    check_flag,
    check_number,
    check_size,
    check_window,
    refuse_unknown,
)


@dataclass(frozen=True)
class Field:
    """A field of config.json, and the field of Spec that says the same.

    Attributes:
        config: its name in config.json.
        spec: its name in Spec.
        check: its value, or an error.
        optional: whether a config may leave it out: the family's default then holds.
        into: Spec's value from the config's.
        back: the config's from Spec's.
    """

    config: str
    spec: str
    check: Callable[[Any, str, str], Any] = check_size
    optional: bool = False
    into: Callable[[Any], Any] = lambda value: value
    back: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Refused:
    """A field whose value plait cannot convert, and the sentence that says so; ``{}`` is the value."""

    config: str
    fails: Callable[[Any], bool]
    words: str


# fmt: off
FIELDS: tuple[Field, ...] = (
    Field("vocab_size",              "vocab_size"),
    Field("hidden_size",             "hidden_size"),
    Field("intermediate_size",       "intermediate_size"),
    Field("num_hidden_layers",       "num_layers"),
    Field("num_attention_heads",     "num_attention_heads"),
    Field("num_key_value_heads",     "num_key_value_heads",     optional=True),
    Field("head_dim",                "head_dim",                optional=True),
    Field("rms_norm_eps",            "rms_norm_eps",            check_number),
    Field("max_position_embeddings", "max_position_embeddings"),
    Field("tie_word_embeddings",     "tied",                    check_flag, optional=True),
)
# fmt: on
WINDOW = Field("sliding_window", "sliding_window", check_window, optional=True)
"""Read by the families all of whose layers attend within a window, or none."""


def _some_slide(kinds: Any) -> bool:
    return any(kind != "full_attention" for kind in kinds or ())


def _kinds_mixed(kinds: Any) -> bool:
    return len(set(kinds or ())) > 1


BIASES = tuple(
    Refused(name, bool, f"has {name}; plait converts models without biases")
    for name in ("attention_bias", "mlp_bias")
)
SILU = Refused(
    "hidden_act", lambda name: name not in (None, "silu"), "has hidden_act {!r}; plait converts silu models"
)
SLIDES = (
    Refused("use_sliding_window", bool, "has use_sliding_window, which plait cannot convert yet"),
    Refused("layer_types", _some_slide, "has use_sliding_window, which plait cannot convert yet"),
)
"""Families some of whose layers attend within a window: plait has one for all layers or for none."""
FULL = Refused(
    "layer_types", _some_slide, "has layer_types {}; all layers of such a model attend to all tokens"
)
ALIKE = Refused("layer_types", _kinds_mixed, "has layer_types of several kinds; plait's layers are all alike")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers.

    Attributes:
        architecture: its class.
        model_type: what its configs say.
        defaults: what transformers takes for a field that a config leaves out. A config of a model must have
            those of :data:`FIELDS` that are not optional; the ``text_config`` of LLaVA may lack any.
        fields: which are read.
        traits: fields of Spec that every model of the family has.
        refused: values that are not converted.
        inert: fields of this family that decide no number.
        theta: the rotary base of a config that says none.
        check: what must hold between the fields that were read; it raises where it does not.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    fields: tuple[Field, ...] = FIELDS
    traits: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[Refused, ...] = (*BIASES, SILU, FULL)
    inert: frozenset[str] = frozenset()
    theta: float = rope.THETA
    check: Callable[[Mapping[str, Any], str], None] = lambda found, where: None  # noqa: ARG005

    @property
    def known(self) -> set[str]:
        """Every field that is read, refused at some values, or known to decide nothing."""
        read = {row.config for row in self.fields} | {row.config for row in self.refused}
        return read | {*rope.FIELDS} | self.inert

    def read(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields of Spec that a config gives.

        Raises:
            CheckpointError: a field is missing, has a value that plait cannot convert, or is unknown.
        """
        self._refuse(config, where)
        found = {row.spec: self._value(row, config, where) for row in self.fields}
        theta, scaling = rope.read(config, where, theta=self.theta)
        heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
        if heads % groups:
            raise CheckpointError(
                f"{where}: {heads} attention heads do not divide into {groups} key-value heads"
            )
        self.check(found, where)
        return {**self.traits, **found, "rope_theta": theta, "rope": scaling}

    def write(self, spec: Any) -> dict[str, Any]:
        """The config of a model, as transformers 5 reads it; :meth:`read` gives the same Spec again."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{row.config: row.back(getattr(spec, row.spec)) for row in self.fields},
            **rope.write(spec.rope_theta, spec.rope),
            "hidden_act": "silu",
            "dtype": spec.dtype,
        }

    def _value(self, row: Field, config: Mapping[str, Any], where: str) -> Any:
        value = config.get(row.config, self.defaults.get(row.config) if row.optional else None)
        if value is None and row.config == "num_key_value_heads":
            value = config["num_attention_heads"]
        if value is None and row.config == "head_dim":
            value = config["hidden_size"] // config["num_attention_heads"]
        if value is None and not row.optional:
            raise CheckpointError(f"{where} has no {row.config}")
        return row.into(row.check(value, row.config, where))

    def _refuse(self, config: Mapping[str, Any], where: str) -> None:
        kind = config.get("model_type", self.model_type)
        if kind != self.model_type:
            raise CheckpointError(
                f"{where} is of architecture {self.architecture} and of model_type {kind!r}",
                hint=f"{self.architecture} has model_type {self.model_type!r}",
            )
        for row in self.refused:
            value = config.get(row.config)
            if row.fails(value):
                raise CheckpointError(f"{where} {row.words.format(value)}")
        refuse_unknown(config, self.known, where)
