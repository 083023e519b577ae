"""Integer grids: affine arithmetic, how a range is chosen, how scales are kept.

Not here: packed storage and formats that are no integer grid (`quantize.codecs`).
"""
