"""What a run tells to programs that collect runs: one thin file for each of them, over the library that does the work.

Not here: a run's own log and results, which are written whatever becomes of these (`ptq.run.record`).
"""
