"""Tuners, one file each: they learn on the finished network as a whole. A recipe has one at most, after its solver."""
