"""What of a run's data and machine does not fit its model, before either is made or asked for."""

from plait.config import Plan
from plait.errors import CheckpointError, ConfigError, DataError
from plait.models.specs import Spec
from plait.preflight.memory import GIGA


def check_data(plan: Plan, run: str, spec: Spec) -> None:
    """Refuse sequences longer than the model's positions, and pictures of another number of tokens.

    Raises:
        DataError: it has both numbers.
        CheckpointError: a run of pictures has a model without a tower.
    """
    keys, longest = plan.run(run), spec.max_position_embeddings
    if plan.sequence(run) > longest:
        raise DataError(
            f"mixtures.{keys.mixture} has sequences of {plan.sequence(run)} tokens, {keys.model} has "
            f"max_position_embeddings {longest}",
            hint=f"shorten them to at most {longest} tokens",
        )
    counted = plan.config.formats[plan.config.mixtures[keys.mixture].format].picture_tokens
    if counted is None or not plan.config.mixtures[keys.mixture].decoder_seq_length:
        return
    if spec.vision is None:
        raise CheckpointError(f"{keys.model} has no vision tower, and runs.{run} has recipe {keys.recipe!r}")
    if counted != spec.vision.tokens:
        raise DataError(
            f"mixtures.{keys.mixture} counts {counted} tokens a picture, the tower of {keys.model} gives "
            f"{spec.vision.tokens}",
            hint="set picture_tokens of the format in config/ to that number",
        )


def check_memory(needed: float, device: float | None) -> None:
    """Refuse a run whose fullest rank does not fit its device.

    Args:
        needed: bytes of that rank.
        device: bytes of a device; None where they are not known.

    Raises:
        ConfigError: it has both numbers.
    """
    if device is not None and needed > device:
        raise ConfigError(
            f"a rank needs {needed / GIGA:.1f} GB, a device has {device / GIGA:.1f} GB",
            hint="raise parallel sizes, set use_distributed_optimizer or recompute_granularity: full",
        )
