"""Kernels that multiply the integers of weight and input, with int32 sums. Importing the package registers them, as a module of
`quantize.kernels` does.
"""

from quantize.kernels.integers import fbgemm, int_mm, onednn_int8

__all__ = ["fbgemm", "int_mm", "onednn_int8"]
