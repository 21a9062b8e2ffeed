"""Text and pictures to ids: tokenizers, templates, packing, Megatron's format, mixtures."""
