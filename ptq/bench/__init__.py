"""The speed of a quantized model beside its baseline and beside other runtimes: ``python -m ptq bench``.

Here: sides that take turns, what is measured of them, the machine's limits, tables and pictures; one file a competitor in
`ptq.bench.against`. Not here: the quality of a model (`ptq.run`), kernels (`quantize.kernels`).
"""
