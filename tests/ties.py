"""A rank's weights, as the converter cuts them."""

from plait.convert import engine


def stage_of(weights, spec, grid, tp, pp):
    """A rank's weights from Hugging Face's; the last of several stages has a tied embedding too."""
    return dict(engine.cut(engine.to_mcore(weights, spec), spec, grid, tp, pp))
