"""What a number format is: `QuantSpec`, the facts of every format, the rules of which tensor may have which.

Not here: how a format computes (`quantize.codecs`), how ranges are chosen (`quantize.grid`).
"""
