"""What a model takes, from its config alone: parameters, bytes, FLOPs, KV cache."""
