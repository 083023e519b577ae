"""GGUF's K-quants as formats of weights: superblocks of 256 values of a row, whose blocks have scales of 6 or 8 bits.

Importing the package registers them, as a module of `quantize.codecs` does.
"""

from quantize.codecs.k_quants import codec

__all__ = ["codec"]
