"""Quantized models outside of runs: in any torch module, and in transformers' ``from_pretrained``."""
