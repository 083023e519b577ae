"""Quantized Linears as torch modules: simulated in floating point, and packed.

Not here: the products that they call (`quantize.kernels`).
"""
