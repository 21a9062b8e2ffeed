"""Rotary embeddings: what configs of transformers 4 and 5 say of them, read and written.

Transformers 4 has ``rope_theta`` and, where the angles are scaled, ``rope_scaling``; transformers 5 has all
of it in ``rope_parameters``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plait.errors import CheckpointError
from plait.models.families.fields import check_number, check_size, part

FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved", "partial_rotary_factor")
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each kind of scaling is told, by the names in a config."""
THETA = 10000.0
SPELLINGS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How the angles of a rotary embedding are scaled.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides those whose wavelength is above
    ``original_max_position_embeddings / low_freq_factor``, leaves those below ``.../ high_freq_factor``, and
    goes from one to the other in between.
    """

    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


PLAIN = Rope()
"""No scaling."""


def read(config: Mapping[str, Any], where: str, *, theta: float = THETA) -> tuple[float, Rope]:
    """The rotary base of a config, and its scaling.

    Args:
        config: the config.
        where: its name in errors.
        theta: the base of a model that says none.

    Raises:
        CheckpointError: the config contradicts itself, or asks for what Megatron Core does not compute.
    """
    found = _parameters(config, where)
    _refuse(config, found, where)
    bases = {one["rope_theta"] for one in (found, config) if _hashable(one.get("rope_theta"), where)}
    if len(bases) > 1:
        raise CheckpointError(f"{where} has two of rope_theta: {' and '.join(map(str, sorted(bases)))}")
    base = float(check_number(next(iter(bases), theta), "rope_theta", where))
    return base, _scaling(found, config, where)


def write(theta: float, rope: Rope) -> dict[str, Any]:
    """The fields as transformers 5 has them."""
    told = {key: getattr(rope, key) for key in KINDS[rope.kind]}
    return {"rope_parameters": {"rope_type": rope.kind, "rope_theta": theta, **told}}


def _parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    old, new = part(config, "rope_scaling", where), part(config, "rope_parameters", where)
    if old and new and old != new:
        raise CheckpointError(f"{where} has rope_scaling and rope_parameters, and they differ")
    return new or old


def _hashable(value: Any, where: str) -> bool:
    """Whether a base is given; what is no number is refused."""
    return value is not None and check_number(value, "rope_theta", where) > 0


def _kind(found: Mapping[str, Any]) -> Any:
    return found.get("rope_type", found.get("type", "default"))


def _refuse(config: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Refuse kinds and parameters that Megatron Core would not compute with."""
    kind = _kind(found)
    if kind not in KINDS:
        raise CheckpointError(
            f"{where} scales its rotary embedding ({kind!r}), which plait cannot convert yet",
            hint=f"plait knows {', '.join(KINDS)}",
        )
    odd = sorted(key for key, value in found.items() if value and key not in (*SPELLINGS, *KINDS[kind]))
    if odd:
        raise CheckpointError(
            f"{where}: a rotary embedding of kind {kind!r} has {odd[0]}, which plait does not know"
        )
    if config.get("rope_interleaved"):
        raise CheckpointError(f"{where} has rope_interleaved; plait converts models of rotated halves")
    for one in (config, found):
        if one.get("partial_rotary_factor") not in (None, 1):
            raise CheckpointError(
                f"{where} has partial_rotary_factor {one['partial_rotary_factor']!r}; "
                "plait converts models whose heads are rotated whole"
            )


def _scaling(found: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Rope:
    kind = _kind(found)
    if kind == "default":
        return PLAIN
    lengths = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    told: dict[str, Any] = {key: (lengths | dict(found)).get(key) for key in KINDS[kind]}
    lacking = [key for key, value in told.items() if value is None]
    if lacking:
        raise CheckpointError(f"{where}: a rotary embedding of kind {kind!r} lacks {lacking[0]}")
    for key, value in told.items():
        (check_size if key in lengths else check_number)(value, key, where)
    rope = Rope(kind=kind, **told)
    if kind == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        raise CheckpointError(f"{where}: high_freq_factor is not above low_freq_factor")
    return rope
