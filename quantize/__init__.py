"""Tensors in, tensors out: number formats, solvers, quantized modules. Knows no model, no file, no config system."""
