"""What a run says of itself: lines and phases, where it was made, what it took, its files at the end.

Not here: tables and pictures (`ptq.report`), the arithmetic of comparisons (`ptq.evaluation`).
"""
