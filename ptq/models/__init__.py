"""Models: found (hub, folder, GGUF file, package), checked, read, their weights held resident or offloaded.

Not here: a model as blocks (`ptq.network`).
"""
