"""A model as blocks: its links, norms, attentions, what is added to the residual stream, and the block stream that carries
hidden states through it.

Not here: what is recorded on the way (`ptq.calibration`).
"""
