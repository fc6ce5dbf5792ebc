"""Bases of every kind: GGUF files, adapters, quantized models."""
