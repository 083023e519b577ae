"""The command lines of many experiments: sweeps with their shipped ablations, pages, comparisons."""
