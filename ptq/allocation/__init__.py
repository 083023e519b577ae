"""Which bits where: candidate formats, and what rounding each Linear's weight to them costs.

Not here: the Fisher information (`ptq.calibration.fisher`).
"""
