"""The experts of a mixture as Linears: found in whatever tensor holds them, taken apart, and fed through the model's own routing.

Not here: how many tokens experts see while a model is calibrated (`ptq.calibration`).
"""
