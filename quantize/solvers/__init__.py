"""Who picks the quantized weights beyond rounding to nearest: GPTQ and what it shares with others, searched clips and scales,
learned rounding, low-rank factors of what rounding leaves.

Not here: what changes a weight without quantizing it (`quantize.transforms`).
"""
