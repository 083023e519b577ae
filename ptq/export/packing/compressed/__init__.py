"""What compressed-tensors calls things: floats of 4 and 8 bits, scales that Linears share, caches. Integers are the package's own work."""
