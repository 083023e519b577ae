"""What a recipe is: the only schema, the scheme resolved for one module, where shipped configs are.

Not here: Hydra and command lines (`ptq.cli`).
"""
