"""Memory of this process: how much there may be, how much is free, what goes back to the system.

Not here: what a run will take (`ptq.run.forecast`).
"""
