"""Tasks beside perplexity: task files and lm-eval's own, baseline and quantized model on the same samples.

Not here: when in a run they are evaluated (`ptq.run`).
"""
