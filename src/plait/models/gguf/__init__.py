"""GGUF files of llama.cpp: their headers, tensors and tokenizers, as Hugging Face folders."""
