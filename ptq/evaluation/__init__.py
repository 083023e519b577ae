"""How good a quantized model is: the paired comparison of token losses with the baseline.

Every token's figures (`token_comparison`), what a result says of them (`comparison`), how sure its difference is (`interval`),
llama.cpp's columns (`token_statistics`); two finished runs beside each other (`paired`).

Not here: tables and pictures of it (`ptq.report`).
"""
