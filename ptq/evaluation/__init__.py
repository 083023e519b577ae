"""How good a quantized model is: the paired comparison of token losses with the baseline.

Not here: tables and pictures of it (`ptq.report`).
"""
