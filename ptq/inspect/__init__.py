"""Readers of model files, and reference passes over them with the arithmetic of their runtimes.

Not here: their writers (`ptq.export`).
"""
