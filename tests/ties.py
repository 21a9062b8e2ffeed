"""What a stage of a tied model is loaded with."""

from plait.convert import engine, ops
from plait.models.specs import EMBEDDING

COPY = "output_layer.weight"


def stage_of(weights, spec, grid, tp, pp):
    """A rank's weights from Hugging Face's; the last of several stages has the tied embedding too."""
    state = dict(engine.cut(engine.to_mcore(weights, spec), spec, grid, tp, pp))
    if spec.tied and grid.pp > 1 and pp == grid.pp - 1:
        state.setdefault(COPY, ops.VOCAB.cut(weights[EMBEDDING], spec, tp=grid.tp, rank=tp))
    return state
