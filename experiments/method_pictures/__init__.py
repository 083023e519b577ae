"""One small picture a method, drawn from real weights and activations: what it does, to be looked at beside docs/methods.md.

What they are drawn from is in `material`, how they look in `canvas`; each picture is a function that returns a figure and the
lines that it prints, so that no caption needs a number of its own.
"""
