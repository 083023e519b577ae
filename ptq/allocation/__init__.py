"""Which bits where: candidate formats, what rounding each Linear's weight to them costs, allocation under a budget, its verification.

Not here: the Fisher information (`ptq.calibration.fisher`).
"""
