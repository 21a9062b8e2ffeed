"""Proofs of model artifacts: coverage, Merkle roots, logits against transformers."""
