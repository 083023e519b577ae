"""Kernels of quantized weights and activations in floating point. Importing the package registers them, as a module of
`quantize.kernels` does.
"""

from quantize.kernels.weight_only import digits, gemlite, int4pack, int8pack

__all__ = ["digits", "gemlite", "int4pack", "int8pack"]
