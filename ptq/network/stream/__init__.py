"""What the block stream hands to blocks, and where: the calls that the model makes, moved to the device that a block computes on.

Not here: the loop itself (`ptq.network.block_stream`).
"""
