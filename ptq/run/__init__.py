"""One experiment: session, checks before the work, plan, quantization, journal.

Not here: many experiments, command lines (`ptq.cli`).
"""
