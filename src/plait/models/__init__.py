"""Hugging Face model folders: their shapes, their tensors, and how new ones are made."""
