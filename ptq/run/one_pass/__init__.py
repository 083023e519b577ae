"""A run that reads each weight once: links, baseline, calibration and quantization of a block while it is in memory, and what is
kept of a finished block is a shard of the export.

Not here: runs whose steps have to see the whole network before the first block (`ptq.run.experiment`).
"""
