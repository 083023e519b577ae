"""Many experiments: points of a sweep, who runs them where, one table of them all, and comparing runs.

Not here: one experiment (`ptq.run`), command lines and Hydra's grammar (`ptq.cli`), pictures and pages (`ptq.report`).
"""
