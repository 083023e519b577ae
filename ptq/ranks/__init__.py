"""Several processes at work on one run: who they are, what they tell one another, and sums that do not depend on how many they are.

Here: the `World` protocol and its one-rank default, torch.distributed behind it, how samples are shared out, sums in the order of
samples, the store as several ranks see it. Not here: what is summed (calibration, steps), and points of a sweep (`ptq/sweep/launchers`).
"""
