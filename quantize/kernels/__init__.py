"""Who multiplies: products by shape, dtype and device.

Not here: modules that hold weights (`quantize.modules`).
"""
