"""The edge: command lines and Hydra. Nothing below imports either."""
