"""Trellis-coded weights: the format (`codec`) and the search for the best codes (`viterbi`).

Importing the package registers the format, as a module of `quantize.codecs` does.
"""

from quantize.codecs.trellis import codec

__all__ = ["codec"]
