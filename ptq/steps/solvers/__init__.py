"""Solvers, one file each: they pick a block's quantized weights. A recipe has one at most, after its transforms."""
