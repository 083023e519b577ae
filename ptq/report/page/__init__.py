"""The page of a sweep: one HTML file that needs no network. Its template, style and script lie beside the code that fills them.

Not here: which sweep, and when (`ptq.sweep`, `ptq.cli`).
"""
