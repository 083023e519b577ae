"""Kernels of 8-bit floats. Importing the package registers them, as a module of `quantize.kernels` does."""

from quantize.kernels.fp8 import scaled_mm

__all__ = ["scaled_mm"]
