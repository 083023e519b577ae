"""A sweep whose points are chosen while it runs: the space, Optuna's study of it, the points that no other beats.

Not here: how a point is run (`ptq.sweep`), reading command lines and composing recipes (`ptq.cli.sweeps`).
"""
