"""LLaVA whose projector has an inner size of its own (``projector_hidden_size`` of the config)."""

from torch import nn
from transformers import LlavaConfig
from transformers import LlavaForConditionalGeneration as Stock
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

# The names in the file are those of the stock class: its mapping serves this one too.
register_checkpoint_conversion_mapping("llava", get_checkpoint_conversion_mapping("llava"), overwrite=True)


class LlavaForConditionalGeneration(Stock):
    """The class of transformers, with its two projecting layers made anew."""

    config_class = LlavaConfig

    def __init__(self, config):
        super().__init__(config)
        projector, inner = self.model.multi_modal_projector, config.projector_hidden_size
        bias = config.multimodal_projector_bias
        projector.linear_1 = nn.Linear(projector.linear_1.in_features, inner, bias=bias)
        projector.linear_2 = nn.Linear(inner, config.text_config.hidden_size, bias=bias)
        self.post_init()
