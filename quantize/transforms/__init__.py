"""The arithmetic of changes that preserve a network's function: scales that migrate, rotations.

Not here: where in a network they may be applied (`ptq.network`, `ptq.steps`).
"""
