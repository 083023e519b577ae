"""What is written beside a model for what its own format has no place for: corrections of low rank, one file a library that loads them.

Not here: the formats themselves (`ptq.export`).
"""
