"""What a run will take, before it: memory, seconds, bytes read and written, by phase, from shapes and a short look at this machine.

Not here: what a model takes by itself (`ptq/footprint`), and what a run has taken (`ptq/run/record`).
"""
