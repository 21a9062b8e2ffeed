"""From raw jsonl to a Hugging Face checkpoint by way of Megatron Core."""

__version__ = "0.1.0"
