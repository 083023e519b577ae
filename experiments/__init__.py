"""Ablations, reports and benchmarks over many runs."""
