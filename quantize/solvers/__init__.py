"""Who picks the quantized weights beyond rounding to nearest: GPTQ, correction of carried error.

Not here: what changes a weight without quantizing it (`quantize.transforms`).
"""
