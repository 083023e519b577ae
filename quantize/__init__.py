"""Tensors in, tensors out: number formats, solvers, transforms, quantized modules. Knows no model, no file, no config system."""
