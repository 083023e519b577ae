"""Every format's encode, decode and layout: one file a format, registered where it is written (`quantize.codecs.registry`).

Not here: which codes a solver picks (`quantize.solvers`), who multiplies by them (`quantize.kernels`).
"""
