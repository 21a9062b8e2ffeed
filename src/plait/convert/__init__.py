"""Hugging Face to Megatron and back, whole or cut for a grid, by rows read in every direction."""
