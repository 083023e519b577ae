"""From a recipe file and what was typed to recipes: the one place that knows Hydra and OmegaConf.

Not here: what a recipe may say (`ptq.config`), command lines (`ptq.cli.app`).
"""
