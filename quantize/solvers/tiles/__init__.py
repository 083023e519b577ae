"""Solvers for formats that code many weights of several rows and columns together.

Not here: formats whose weights are codes by themselves (`quantize.solvers.feedback`).
"""
