"""Post-training quantization of decoder-only language models: models, data, statistics, block stream, steps, evaluation."""

__version__ = "0.1.0"
