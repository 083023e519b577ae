"""Kernels of quantized weights and activations in floating point. Importing the package registers them, as a module of
`quantize.kernels` does.
"""

from quantize.kernels.weight_only import digits, int4pack, int8pack

__all__ = ["digits", "int4pack", "int8pack"]
