"""What is recorded while calibration samples pass: statistics, and the samples as they reach a block.

Not here: what a method does with it (`ptq.steps`).
"""
