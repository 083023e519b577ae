"""Methods, one file each: transforms that keep a block's function and solvers that pick its quantized weights.

Modules that begin with an underscore are what methods share. Arithmetic on tensors alone is in `quantize` and
`group_methods`.
"""
